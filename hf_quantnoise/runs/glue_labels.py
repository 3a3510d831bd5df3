"""Labels and scores of ``run_glue.py``: which classes a set holds, which id each has, metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction, PretrainedConfig

logger = logging.getLogger(__name__)

REGRESSION_TASKS = ("stsb",)


def _has_head(config: PretrainedConfig) -> bool:
    return any("ForSequenceClassification" in name for name in config.architectures or [])


def _labels_in(data: Dataset, column: str) -> tuple[list, list[str]]:
    """The distinct labels of a set in order, and their names."""
    feature = data.features[column]
    if isinstance(feature, ClassLabel):
        return list(range(feature.num_classes)), list(feature.names)
    values = sorted(data.unique(column))
    return values, [str(value) for value in values]


def _order_as_in_checkpoint(
    values: list, names: list[str], config: PretrainedConfig, ignore_mismatched_sizes: bool
) -> tuple[dict, list[str]]:
    """Label ids: the checkpoint's own where it has a head that knows these labels, else sorted."""
    as_found = {value: i for i, value in enumerate(values)}, names
    if not _has_head(config):
        return as_found
    theirs = [str(config.id2label[i]) for i in range(config.num_labels)]
    ids = {name.lower(): i for i, name in enumerate(theirs)}
    if all(name.lower() in ids for name in names):
        return {v: ids[name.lower()] for v, name in zip(values, names, strict=True)}, theirs
    numbered = all(str(value) == name for value, name in zip(values, names, strict=True))
    if numbered and all(isinstance(v, int) and 0 <= v < len(theirs) for v in values):
        return {value: int(value) for value in range(len(theirs))}, theirs
    if len(names) != len(theirs) and not ignore_mismatched_sizes:
        raise ValueError(
            f"--model_name_or_path has a head for the {len(theirs)} labels {theirs}, the data has "
            f"the {len(names)} labels {names}; give --ignore_mismatched_sizes to put a new head on "
            "it, or data with these labels"
        )
    logger.warning("The checkpoint's labels %s are replaced by the data's, %s", theirs, names)
    return as_found


def find_labels(
    sets: dict[str, Dataset],
    column: str,
    task_name: str | None,
    config: PretrainedConfig,
    ignore_mismatched_sizes: bool,
) -> tuple[dict, list[str]] | tuple[None, None]:
    """Which labels the data has.

    Args:
        sets: flag -> set; the first one says what the labels are, the others must agree.
        column: the label column.
        task_name: GLUE task or None, where floats mean regression.
        config: the checkpoint's; its ids hold where its head knows the labels.
        ignore_mismatched_sizes: let a head for other labels be replaced.

    Returns:
        (label in the data -> id, name of each id), or (None, None) for regression.

    Raises:
        ValueError: naming the flag or column, what it holds and what would do.
    """
    feature = next(iter(sets.values())).features[column]
    kind = str(getattr(feature, "dtype", feature))
    is_float = kind.startswith(("float", "double", "decimal"))
    if task_name in REGRESSION_TASKS or (is_float and task_name is None):
        if not is_float and not kind.startswith(("int", "uint")):
            raise ValueError(
                f"--task_name {task_name!r} is a regression, but column {column!r} holds {kind}; "
                "give numbers, or leave --task_name out"
            )
        _check_regression_head(config, ignore_mismatched_sizes)
        logger.info("The labels are numbers (%s): regression.", kind)
        return None, None
    if is_float:
        raise ValueError(
            f"--task_name {task_name!r} has classes, but column {column!r} holds {kind}; "
            "store the labels as integers or strings"
        )
    values, names = _labels_in(next(iter(sets.values())), column)
    label_values, label_names = _order_as_in_checkpoint(
        values, names, config, ignore_mismatched_sizes
    )
    _check_all_known(sets, column, label_values)
    return label_values, label_names


def _check_regression_head(config: PretrainedConfig, ignore_mismatched_sizes: bool) -> None:
    if _has_head(config) and config.num_labels != 1 and not ignore_mismatched_sizes:
        raise ValueError(
            f"--model_name_or_path has a head for {config.num_labels} labels, the data is a "
            "regression (one output); give --ignore_mismatched_sizes to put a new head on it, "
            "or store the labels as integers or strings for classes"
        )


def _check_all_known(sets: dict[str, Dataset], column: str, label_values: dict) -> None:
    for flag, data in sets.items():
        values, _ = _labels_in(data, column)
        if -1 in values:
            raise ValueError(
                f"--{flag}: column {column!r} holds -1, GLUE's mark for a hidden label (a test "
                "set); give a labelled set"
            )
        strange = [value for value in values if value not in label_values]
        if strange:
            raise ValueError(
                f"--{flag}: column {column!r} holds the labels {strange[:5]}, unknown to the "
                f"training data or the model (they know {list(label_values)}); remove or map them"
            )


# ---- metrics -------------------------------------------------------------------------------------
# scikit-learn's and not evaluate.load("glue", task), which fetches a script from the Hub for every
# metric: these are the same figures, and a run on local files needs no network.

Metric = Callable[[np.ndarray, np.ndarray], float]
METRICS: dict[str, Metric] = {
    "accuracy": lambda predicted, labels: accuracy_score(labels, predicted),
    "f1": lambda predicted, labels: f1_score(labels, predicted),
    "matthews_correlation": lambda predicted, labels: matthews_corrcoef(labels, predicted),
    "pearson": lambda predicted, labels: pearsonr(predicted, labels).statistic,
    "spearmanr": lambda predicted, labels: spearmanr(predicted, labels).statistic,
}


def metrics_function(
    metrics: Sequence[str], is_regression: bool
) -> Callable[[EvalPrediction], dict[str, float]]:
    """The ``compute_metrics`` of a Trainer, for names in :data:`METRICS`."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        predicted = np.squeeze(logits, -1) if is_regression else np.argmax(logits, axis=-1)
        return {name: float(METRICS[name](predicted, prediction.label_ids)) for name in metrics}

    return compute
