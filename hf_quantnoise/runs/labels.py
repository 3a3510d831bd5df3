"""Labels of the classification examples."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

REGRESSION_TASKS = ("stsb",)
_FLOATS = ("float", "double", "decimal")  # types of columns
_NUMERIC = (*_FLOATS, "int", "uint")
_SHOWN = 10  # labels that an error or warning lists
# Names of the labels of GLUE tasks, in the order of their ids on the Hub.
LABELS = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
    "wnli": ("not_entailment", "entailment"),
}


def _has_head(config: PretrainedConfig) -> bool:
    heads = ("ForSequenceClassification", "ForImageClassification")
    return any(head in name for name in config.architectures or [] for head in heads)


def labels_in(data: Dataset, column: str, task_name: str | None = None) -> tuple[list, list[str]]:
    """Return the distinct labels of a dataset in order, and their names.

    If they are ids or names of a GLUE task, these are all labels of the task.
    """
    feature = data.features[column]
    if not isinstance(feature, ClassLabel | Value):
        raise ValueError(
            f"invalid --label_column {column!r}: the column has {feature}, expected one label per "
            "row: integers or strings (floats for regression)"
        )
    if isinstance(feature, ClassLabel):
        return list(range(feature.num_classes)), list(feature.names)
    values = sorted(data.unique(column))
    names = list(LABELS.get(task_name or "", ()))
    for known in (list(range(len(names))), names):
        if known and all(value in known for value in values):
            return known, names
    return values, [str(value) for value in values]


def order_as_in_checkpoint(
    values: list,
    names: list[str],
    config: PretrainedConfig,
    ignore_mismatched_sizes: bool,
    allow_fewer: bool = True,
) -> tuple[dict, list[str]]:
    """Return the label ids: those of the checkpoint if its head has these labels, else sorted.

    Args:
        values: the labels of the data.
        names: their names.
        config: of the checkpoint.
        ignore_mismatched_sizes: whether a head with another number of labels may be replaced.
        allow_fewer: whether the head may have more labels than the data.
    """
    as_found = {value: i for i, value in enumerate(values)}, names
    if not _has_head(config):
        return as_found
    known = [str(config.id2label[i]) for i in range(config.num_labels)]
    if not allow_fewer and known == [f"LABEL_{i}" for i in range(len(names))]:
        return as_found  # the head has this number of labels, without names
    if allow_fewer or len(names) == len(known):
        for spelled in (str, str.lower):
            ids = {spelled(name): i for i, name in enumerate(known)}
            found = [ids.get(spelled(name)) for name in names]
            if None not in found and len({*found}) == len(names):
                return dict(zip(values, found, strict=True)), known
        numbered = all(str(value) == name for value, name in zip(values, names, strict=True))
        if numbered and all(isinstance(v, int) and 0 <= v < len(known) for v in values):
            return {value: int(value) for value in range(len(known))}, known
    if len(names) != len(known) and not ignore_mismatched_sizes:
        raise ValueError(
            f"--model_name_or_path has a head for the {_listed(known)}, the data has the "
            f"{_listed(names)}; pass --ignore_mismatched_sizes to replace the head, or data with "
            "these labels"
        )
    shown = _listed(known), _listed(names)
    logger.warning("The checkpoint's %s are replaced by the data's, %s", *shown)
    return as_found


def _listed(names: list[str]) -> str:
    """Return the number of labels and the first of them: ``2 labels ['no', 'yes']``."""
    more = [] if len(names) <= _SHOWN else ["..."]
    return f"{len(names)} labels {names[:_SHOWN] + more}"


def set_labels(config: PretrainedConfig, names: list[str] | None) -> None:
    """Give a config the labels of a classifier, or one output for regression (None).

    Raises:
        ValueError: if there is only one label: transformers would train a regression.
    """
    if names is None:
        config.num_labels = 1
        config.problem_type = "regression"
        return
    if len(names) < 2:
        raise ValueError(
            f"invalid labels: all examples have the label {names[0]!r}, expected at least 2 "
            "different ones; check --label_column, or pass data with more labels"
        )
    config.problem_type = None  # of a head that is replaced: regression, or several labels
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def find_labels(
    sets: dict[str, Dataset],
    column: str,
    task_name: str | None,
    config: PretrainedConfig,
    ignore_mismatched_sizes: bool,
) -> tuple[dict, list[str]] | tuple[None, None]:
    """Return the labels of the data: label -> id, and the name of each id.

    The first of ``sets`` (flag -> dataset) defines the labels; the others must have the same. If
    the head of the checkpoint (``config``) has these labels, its ids are used. For regression
    (numeric labels of a task without classes, or without a task), return None twice.
    """
    first = next(iter(sets.values()))
    feature = first.features[column]
    kind = str(getattr(feature, "dtype", feature))
    is_float = kind.startswith(_FLOATS)
    if task_name in REGRESSION_TASKS or (is_float and task_name is None):
        if not kind.startswith(_NUMERIC):
            raise ValueError(
                f"--task_name {task_name!r} is a regression, but column {column!r} has {kind}; "
                "pass data with numeric labels, or remove --task_name"
            )
        if _has_head(config) and config.num_labels != 1 and not ignore_mismatched_sizes:
            raise ValueError(
                f"--model_name_or_path has a head for {config.num_labels} labels, the data is a "
                "regression (one output); pass --ignore_mismatched_sizes to replace the head, or "
                "store the labels as integers or strings for classes"
            )
        logger.info("The labels are numeric (%s): regression.", kind)
        _require_finite(sets, column)
        return None, None
    if is_float:
        raise ValueError(
            f"--task_name {task_name!r} has classes, but column {column!r} has {kind}; "
            "store the labels as integers or strings"
        )
    found = labels_in(first, column, task_name)
    ids, names = order_as_in_checkpoint(*found, config, ignore_mismatched_sizes)
    check_labels(sets, column, ids)
    return ids, names


def labels_of_checkpoint(
    task_name: str | None, config: PretrainedConfig
) -> tuple[dict, list[str]] | tuple[None, None]:
    """Return the labels of a finetuned checkpoint, as :func:`find_labels` does for data."""
    if not _has_head(config):
        raise ValueError(
            "--do_predict needs a finetuned --model_name_or_path; pass one, or --do_train"
        )
    if task_name in REGRESSION_TASKS or config.num_labels == 1:
        return None, None
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return {name: i for i, name in enumerate(names)}, names


def _require_finite(sets: dict[str, Dataset], column: str) -> None:
    """Raise a ``ValueError`` that names the flag if labels of a regression are not finite."""
    for flag, data in sets.items():
        feature = data.features[column]
        if not str(getattr(feature, "dtype", feature)).startswith(_NUMERIC):
            raise ValueError(
                f"invalid --{flag}: column {column!r} has {feature}, expected the values of a "
                "regression, as in the training data; store the labels of all files alike"
            )
        values = np.asarray(data[column][:], dtype=np.float64)
        if count := len(values) - int(np.isfinite(values).sum()):
            raise ValueError(
                f"invalid --{flag}: {count} of {len(values)} labels in column {column!r} are NaN "
                "or infinite; remove these rows or correct them"
            )


def check_labels(sets: dict[str, Dataset], column: str, ids: dict) -> None:
    """Raise a ``ValueError`` that names the flag if a dataset has labels without an id.

    So do classes that have other names in the first dataset, which defines the ids.
    """
    first = next(iter(sets.values())).features[column]
    for flag, data in sets.items():
        labels_in(data, column)  # raises if these are not labels
        values = sorted(data.unique(column))
        if -1 in values:
            raise ValueError(
                f"invalid --{flag}: column {column!r} has the label -1, which marks hidden labels "
                "of GLUE's test sets; pass labelled data"
            )
        if unknown := [value for value in values if value not in ids]:
            raise ValueError(
                f"invalid --{flag}: column {column!r} has the labels {unknown[:5]}, expected those "
                f"of the training data or the model, {list(ids)}; remove or map them"
            )
        feature = data.features[column]
        if not (isinstance(feature, ClassLabel) and isinstance(first, ClassLabel)):
            continue
        for value in values:
            if feature.names[value] != first.names[value]:
                raise ValueError(
                    f"invalid --{flag}: in column {column!r}, class {value} is "
                    f"{feature.names[value]!r}, and {first.names[value]!r} in the training data; "
                    "store the labels as strings, or the classes in the same order"
                )


def check_teacher(teacher: PretrainedConfig, config: PretrainedConfig) -> None:
    """Raise a ``ValueError`` if a teacher has another number or order of labels than the model.

    Other names are allowed: those of the data may be ids.
    """
    theirs, ours = ([str(label) for label in each.id2label.values()] for each in (teacher, config))
    one, two = ([label.lower() for label in labels] for labels in (theirs, ours))
    if len(one) != len(two) or (one != two and sorted(one) == sorted(two)):
        raise ValueError(
            f"invalid --teacher_name_or_path {teacher.name_or_path!r}: got a model with the "
            f"{_listed(theirs)}, expected those of the finetuned model in the same order, "
            f"{_listed(ours)}"
        )


def with_same_labels(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return the finetuned model of a resumed run.

    Raises:
        ValueError: if it has other labels than the data (``config``), or in another order.
    """
    theirs, ours = ([*each.id2label.values()] for each in (model.config, config))
    if theirs != ours:
        raise ValueError(
            f"--resume_compression: the finetuned model has the {_listed(theirs)}, the data has "
            f"the {_listed(ours)}; pass the data of the interrupted run, or remove the flag to "
            "start from scratch"
        )
    return model


def prediction_texts(predictions: Any, label_names: list[str] | None) -> list[str]:
    """Return the predicted label of each example, or its value for regression (None)."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    if label_names is None:
        return [f"{value:3.3f}" for value in np.squeeze(logits, -1)]
    return [label_names[index] for index in np.argmax(logits, axis=-1)]
