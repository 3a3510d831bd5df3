"""Metrics of the package ``evaluate`` as ``compute_metrics`` of a trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import is_offline_mode

from .argument_checks import describe, shorten

if TYPE_CHECKING:
    from transformers import EvalPrediction

FIELD = "compute_metrics"


def decisions(prediction: EvalPrediction, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what a model predicts, and the labels: arrays of shape (examples,).

    Integer labels are classes: the prediction is the largest logit. Floats are values. Predictions
    that have the shape of the labels are returned as they are.

    Raises:
        ValueError: if there is more than one label per example; ``name`` is that of the metric.
    """
    outputs = prediction.predictions
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    labels = np.asarray(prediction.label_ids)
    shape, label_shape = np.shape(outputs), labels.shape
    is_value = not np.issubdtype(labels.dtype, np.integer)
    if (
        len(label_shape) != 1
        or len(shape) not in (1, 2)
        or (is_value and shape[1:] not in ((), (1,)))
    ):
        raise ValueError(
            f"invalid {FIELD}: {name} needs one label per example, got labels of shape "
            f"{label_shape} and outputs of shape {shape}; pass a function that calls its compute"
        )
    if len(shape) == 2:
        outputs = outputs.squeeze(-1) if is_value else outputs.argmax(-1)
    return outputs, labels


class ModuleMetrics:
    """``compute_metrics`` of a ``Trainer`` that calls a module of ``evaluate``.

    Args:
        module: an ``EvaluationModule``, or what ``evaluate.combine`` returns.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, Any]:
        """Add the predictions; ``compute_result`` is False before the last batch of a set."""
        name = getattr(self.module, "name", type(self.module).__name__)
        predicted, labels = decisions(prediction, name)
        self.module.add_batch(predictions=predicted, references=labels)
        result: dict[str, Any] = self.module.compute() if compute_result else {}
        return result


def load_module(
    path: str | os.PathLike[str], config_name: str | None, field: str, way_out: str
) -> Any:
    """Return ``evaluate.load(path, config_name)``, which keeps predictions in memory.

    Args:
        path: a folder, a script, or a name on the Hub, which is not asked in offline mode.
        config_name: configuration of the module.
        field: option and value that errors name.
        way_out: how errors end.

    Raises:
        ImportError: if evaluate is not installed.
        FileNotFoundError: if the module is missing, or the Hub cannot be reached.
        ValueError: if the module refuses the configuration.
    """
    try:
        import evaluate
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{field} requires {error.name}; run pip install evaluate, or {way_out}"
        ) from error
    path = os.fspath(path)
    if path.startswith((".", os.sep, "~")) and not os.path.exists(path):
        raise FileNotFoundError(f"invalid {field}: no such folder or script; {way_out}")
    if is_offline_mode():
        evaluate.config.HF_EVALUATE_OFFLINE = True  # HF_HUB_OFFLINE alone has no effect there
    try:
        return evaluate.load(path, config_name, keep_in_memory=True)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"invalid {field}: expected the folder or script of a metric, or its name on the Hub, "
            f"which has none of this name or cannot be reached; {way_out}"
        ) from error
    except (KeyError, ValueError) as error:
        reason = shorten(str(error.args[0] if error.args else error))
        raise ValueError(
            f"invalid {field}: cannot be loaded with configuration {config_name!r} ({reason}); "
            f"{way_out}"
        ) from error


def as_compute_metrics(value: Any) -> Callable[..., dict[str, float]] | None:
    """Return the function that a ``Trainer`` takes for a function, a module or a path.

    Raises:
        TypeError: for anything else; and what :func:`load_module` raises for a path.
    """
    if value is None or callable(value):
        return value
    if isinstance(value, str | os.PathLike):
        shown = f"{FIELD}={os.fspath(value)!r}"
        way_out = "pass the folder of a metric, or a function"
        return ModuleMetrics(load_module(value, None, shown, way_out))
    if hasattr(value, "add_batch") and hasattr(value, "compute"):
        return ModuleMetrics(value)
    raise TypeError(
        f"invalid {FIELD}: got {describe(value)}, expected a function, a metric of evaluate or the "
        "path of one; pass e.g. evaluate.load('accuracy')"
    )
