"""Finetune a text classifier with quantization noise, compress it, save it and load it again.

A run finetunes with noise, evaluates, compresses stage by stage, saves, loads the compressed model,
checks that its logits are bit-equal, evaluates again and prints a closing table.

The run is in ``compression_run.py``, the flags are in ``arguments.py`` and ``glue_data.py``; they
can also be passed as one JSON file.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
)

from .arguments import Arguments, ModelArguments
from .compression_run import Example, Job
from .glue_data import DataArguments, GlueData, load_glue_data
from .glue_labels import metrics_function

logger = logging.getLogger(__name__)


def load_config_and_tokenizer(args: ModelArguments):
    """Load config and tokenizer; without a padding token, the end-of-text token is used."""
    config = AutoConfig.from_pretrained(args.config_name or args.model_name_or_path, **args.hub())
    tokenizer = AutoTokenizer.from_pretrained(
        args.tokenizer_name or args.model_name_or_path, **args.hub()
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    return config, tokenizer


def load_model(args: ModelArguments, config: PretrainedConfig, data: GlueData) -> PreTrainedModel:
    """Load the checkpoint with a head, and label names in its config, for the data."""
    if data.is_regression:
        config.num_labels = 1
        config.problem_type = "regression"
    else:
        config.id2label = dict(enumerate(data.label_names))
        config.label2id = {name: i for i, name in enumerate(data.label_names)}
    return AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path,
        config=config,
        dtype=args.dtype,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **args.hub(),
    )


def tokenize(data: GlueData, tokenizer, args: DataArguments, model_limit: int | None) -> GlueData:
    """Return the data with tokenized datasets (``input_ids``, ..., ``label``).

    Args:
        model_limit: maximum length of the model, or None if its config has none.
    """
    limits = [args.max_seq_length, tokenizer.model_max_length, model_limit or args.max_seq_length]
    length = min(limits)
    if length < args.max_seq_length:
        logger.warning("--max_seq_length %d reduced to %d.", args.max_seq_length, length)

    raw_label = f"raw {data.label_column}"

    def encode(examples):
        texts = [examples[key] for key in data.keys if key]
        encoded = tokenizer(
            *texts,
            padding="max_length" if args.pad_to_max_length else False,
            max_length=length,
            truncation=True,
        )
        labels = examples[raw_label]
        encoded["label"] = [
            float(label) if data.is_regression else data.label_values[label] for label in labels
        ]
        return encoded

    def apply(dataset: Dataset | None) -> Dataset | None:
        if dataset is None:
            return None
        # Under the old name, map would cast the ids to the type of the labels in the file.
        dataset = dataset.rename_column(data.label_column, raw_label)
        return dataset.map(
            encode,
            batched=True,
            remove_columns=dataset.column_names,
            load_from_cache_file=not args.overwrite_cache,
            desc="Tokenizing",
        )

    return replace(data, train=apply(data.train), validation=apply(data.validation))


def prepare(args: Arguments) -> Job:
    """Load and tokenize the data, load the model."""
    config, tokenizer = load_config_and_tokenizer(args.model)
    data = load_glue_data(
        args.data,
        config,
        train=args.needs_train_data,
        validation=args.training.do_eval,
        ignore_mismatched_sizes=args.model.ignore_mismatched_sizes,
        cache_dir=args.model.cache_dir,
        token=args.model.token,
    )
    model = load_model(args.model, config, data)
    with args.training.main_process_first(desc="tokenizing"):
        limit = getattr(config, "max_position_embeddings", None)
        data = tokenize(data, tokenizer, args.data, limit)
    return Job(
        model=model,
        parts={
            "train_dataset": data.train,
            "eval_dataset": data.validation,
            "compute_metrics": metrics_function(data.metrics, data.is_regression),
            "processing_class": tokenizer,
            "data_collator": DataCollatorWithPadding(tokenizer),
        },
        auto_class=AutoModelForSequenceClassification,
        metric=data.metrics[0],
        task="text-classification",
        dataset=args.data.task_name,
    )


example = Example(
    DataArguments,
    "Finetune a text classifier with quantization noise and compress it.",
    prepare,
)
parse, run, main = example.parse, example.run, example.main
