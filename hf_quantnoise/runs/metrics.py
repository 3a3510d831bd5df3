"""Metrics of classification and regression runs: a module of ``evaluate``, or scikit-learn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from ..argument_checks import shorten
from ..configuration.options import option
from ..metric_modules import ModuleMetrics, decisions, load_module

logger = logging.getLogger(__name__)

SKLEARN = "sklearn"
WAY_OUT = (
    "pass --metrics sklearn, or --metrics with a folder, or run once with a connection to the Hub"
)

Metric = Callable[[np.ndarray, np.ndarray], float]
Compute = Callable[..., dict[str, float]]
METRICS: dict[str, Metric] = {
    "accuracy": lambda predicted, labels: accuracy_score(labels, predicted),
    "f1": lambda predicted, labels: f1_score(labels, predicted),
    "matthews_correlation": lambda predicted, labels: matthews_corrcoef(labels, predicted),
    "pearson": lambda predicted, labels: pearsonr(predicted, labels).statistic,
    "spearmanr": lambda predicted, labels: spearmanr(predicted, labels).statistic,
}


def sklearn_metrics(names: Sequence[str]) -> Compute:
    """Return the ``compute_metrics`` of a Trainer for names in :data:`METRICS`."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predicted, labels = decisions(prediction, SKLEARN)
        return {name: float(METRICS[name](predicted, labels)) for name in names}

    return compute


@dataclass
class MetricArguments:
    """How a run is scored."""

    metrics: str | None = option(
        None,
        "Metric of the package evaluate: its name on the Hub, a folder or a script. Default: "
        f"glue for a task, else accuracy. {SKLEARN}: the same scores from scikit-learn, without "
        "evaluate and the Hub.",
    )

    def scoring(
        self, names: Sequence[str], module: str, config_name: str | None
    ) -> tuple[Compute, str]:
        """Return the ``compute_metrics`` of a trainer, and the metric of the closing table.

        Args:
            names: keys of :data:`METRICS`; the first one is that of the table.
            module: module of evaluate with these metrics, the default of the flag.
            config_name: its configuration.

        Raises:
            FileNotFoundError: if the module is missing, or the Hub cannot be reached.
            ValueError: if it cannot score integers.
        """
        if self.metrics == SKLEARN:
            logger.warning("--metrics sklearn: scored by scikit-learn and scipy, not by evaluate.")
            return sklearn_metrics(names), names[0]
        path = self.metrics or module
        shown = f"--metrics {path!r}" if self.metrics else f"--metrics {path!r} (the default)"
        loaded = load_module(path, config_name, shown, WAY_OUT)
        logger.info("Scored by evaluate.load(%r, %r).", path, config_name)
        try:  # before anything is trained
            found = [*loaded.compute(predictions=[0, 1], references=[0, 1])]
        except Exception as error:  # of any type: the module is code of others
            raise ValueError(
                f"invalid {shown}: it cannot score predictions [0, 1] with references "
                f"[0, 1] ({shorten(str(error))}); pass a metric of classes or values"
            ) from error
        return ModuleMetrics(loaded), names[0] if names[0] in found else found[0]
