"""Finetune a text classifier with quantization noise, compress it, save it and load it again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction

from .arguments import Arguments
from .example import Example
from .glue_data import HUB_DATASET, DataArguments, GlueData, load_glue_data
from .job import Job
from .labels import LABELS, prediction_texts, set_labels
from .metrics import Compute
from .tokenizers import position_limit

logger = logging.getLogger(__name__)


def tokenize(data: GlueData, tokenizer, args: DataArguments, model_limit: int | None) -> GlueData:
    """Return the data with tokenized datasets (``input_ids``, ..., ``label``)."""
    limits = [args.max_seq_length, tokenizer.model_max_length, model_limit or args.max_seq_length]
    length = min(limits)
    if length < args.max_seq_length:
        logger.warning("--max_seq_length %d reduced to %d.", args.max_seq_length, length)

    raw_label = f"raw {args.label_column}"

    def encode(examples):
        texts = [examples[key] for key in data.keys if key]
        padding = "max_length" if args.pad_to_max_length else False
        encoded = tokenizer(*texts, padding=padding, max_length=length, truncation=True)
        require_tokens(encoded, texts, data.keys)
        to_target = float if data.is_regression else data.label_values.__getitem__
        if raw_label in examples:
            encoded["label"] = [to_target(label) for label in examples[raw_label]]
        return encoded

    def apply(dataset: Dataset, has_labels: bool = True) -> Dataset:
        # map casts values to the type of a column of this name in the file: the label ids to that
        # of the labels, or of another column that is called label.
        columns = dict.fromkeys(filter(None, data.keys))
        if has_labels:
            columns[args.label_column] = None
        dataset = dataset.select_columns([*columns])
        if has_labels:
            dataset = dataset.rename_column(args.label_column, raw_label)
        return dataset.map(
            encode,
            batched=True,
            remove_columns=dataset.column_names,
            load_from_cache_file=not args.overwrite_cache,
            desc="Tokenizing",
        )

    return replace(
        data,
        train=data.train and apply(data.train),
        validation=data.validation and apply(data.validation),
        mismatched={suffix: apply(rows) for suffix, rows in data.mismatched.items()},
        test={suffix: apply(rows, False) for suffix, rows in data.test.items()},
    )


def require_tokens(encoded, texts: Sequence[Sequence[str]], columns: Sequence[str | None]) -> None:
    """Raise a ``ValueError`` if an example has no tokens, which models cannot classify.

    Tokenizers that add special tokens to each text, as BERT's does, always return some.

    Args:
        encoded: the examples, tokenized.
        texts: those of each column.
        columns: the names of the columns.
    """
    all_tokens = [[1] * len(ids) for ids in encoded["input_ids"]]
    for number, mask in enumerate(encoded.get("attention_mask", all_tokens)):
        if not any(mask):
            pairs = zip(columns, texts, strict=False)  # the second column may be None
            shown = ", ".join(f"{name}={text[number]!r}" for name, text in pairs)
            raise ValueError(
                f"invalid data: an example has no tokens ({shown}); remove or fill in such rows"
            )


def dataset_of(args: DataArguments) -> dict[str, str | None]:
    """Return the fields of the job that name the evaluation data; files have no id."""
    if args.task is None or args.task_name is None:
        return {}
    name = f"GLUE {args.task_name.upper()}"
    if args.from_files:
        return {"dataset": name}
    split = args.task.hub_splits("validation")[""]
    return {
        "dataset": name,
        "dataset_id": HUB_DATASET,
        "dataset_config": args.task_name,
        "dataset_split": split,
    }


def of_task_ids(compute: Compute, data: GlueData, task_name: str | None) -> Compute:
    """Return metrics that read the two labels of a model as those of a task, in its order.

    F1 is that of the label with id 1, and a checkpoint may have it as id 0.
    """
    if data.label_names is None or data.label_values is None or "f1" not in data.metrics:
        return compute
    names = [name.lower() for name in data.label_names]
    positive = LABELS[str(task_name)][1]
    # Labels without the names of the task are in its order.
    last = names.index(positive) if positive in names else [*data.label_values.values()][1]
    if last == 1:
        return compute

    def compute_swapped(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return compute(EvalPrediction(np.flip(logits, -1), 1 - np.asarray(prediction.label_ids)))

    return compute_swapped


def prepare(args: Arguments) -> Job:
    """Load and tokenize the data, load the model."""
    config, tokenizer = args.model.load_config(), args.model.load_tokenizer()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        config.pad_token_id = tokenizer.pad_token_id
    data = load_glue_data(args.data, args.model, config, args.splits)
    set_labels(config, data.label_names)
    compute_metrics, metric = None, data.metrics[0]
    if args.training.do_eval:
        compute, metric = args.data.scoring(data.metrics, *data.metric_module)
        compute_metrics = of_task_ids(compute, data, args.data.task_name)
    model = args.model.load_model(args.data.auto_class, config)
    with args.training.main_process_first(desc="tokenizing"):
        data = tokenize(data, tokenizer, args.data, position_limit(model))
    return Job(
        model=model,
        parts={
            "train_dataset": data.train,
            "eval_dataset": data.validation,
            "compute_metrics": compute_metrics,
            "processing_class": tokenizer,
            "data_collator": DataCollatorWithPadding(tokenizer),
        },
        metric=metric,
        task="text-classification",
        **dataset_of(args.data),
        more_eval_datasets=data.mismatched,
        test_datasets={
            "_".join(filter(None, ("predict_results", args.data.task_name)))
            + suffix.replace("_", "-"): rows
            for suffix, rows in data.test.items()
        },
        prediction_texts=partial(prediction_texts, label_names=data.label_names),
    )


example = Example(
    DataArguments, "Finetune a text classifier with quantization noise and compress it.", prepare
)
parse, run, main, script = example.parse, example.run, example.main, example.script
