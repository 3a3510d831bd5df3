"""Finetune a text classifier with quantization noise, compress it, save it and load it again.

A run finetunes with noise, evaluates, compresses stage by stage, saves, loads the compressed model,
checks that its logits are bit-equal, evaluates again and prints a closing table.

The run is in ``compression_run.py``, the flags are in ``arguments.py`` and ``glue_data.py``; they
can also be passed as one JSON file.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
)

from .arguments import Arguments, ModelArguments
from .compression_run import Example, Job, finetunes_stages, require_train_data
from .glue_data import DataArguments, GlueData, load_glue_data, tokenize
from .glue_labels import metrics_function


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


def prepare(args: Arguments) -> Job:
    """Load and tokenize the data, load the model."""
    from_hub = args.data.task_name and not args.data.from_files
    require_train_data(args, given=bool(args.data.train_file or from_hub))
    config, tokenizer = load_config_and_tokenizer(args.model)
    data = load_glue_data(
        args.data,
        config,
        train=args.training.do_train or finetunes_stages(args),
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
