"""Paired tests of two methods that ran with the same seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, ttest_1samp

RESAMPLES, LEVEL = 4000, 0.05


def mcnemar(one: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """Return McNemar's exact test of two arrays of right (1) and wrong (0) predictions.

    Returns:
        How many examples only ``one`` has right, how many only ``other``, and the two-sided p.
    """
    first, second = int((one & ~other).sum()), int((other & ~one).sum())
    return first, second, binomtest(first, first + second).pvalue if first + second else 1.0


@dataclass(frozen=True)
class Interval:
    """A mean difference and its interval of 95%."""

    mean: float
    low: float
    high: float

    @property
    def shows_difference(self) -> bool:
        return self.low > 0 or self.high < 0


def _resamples(n: int) -> np.ndarray:
    """Return how often each of ``n`` examples is drawn, (RESAMPLES, n), always the same."""
    return np.random.RandomState(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)


def _interval(mean: float, samples: np.ndarray) -> Interval:
    low, high = np.percentile(samples, (100 * LEVEL / 2, 100 - 100 * LEVEL / 2))
    return Interval(float(mean), float(low), float(high))


def bootstrap_mean(one: np.ndarray, other: np.ndarray) -> Interval:
    """Return the paired bootstrap over examples of the difference of two means.

    Args:
        one, other: values per example, (seeds, examples). An example is drawn with all its seeds.
    """
    difference = (one - other).mean(0)
    return _interval(difference.mean(), _resamples(len(difference)) @ difference / len(difference))


def bootstrap_metric(metric: str, one: np.ndarray, other: np.ndarray, labels) -> Interval:
    """Return the paired bootstrap over examples of the difference of a binary metric.

    Args:
        metric: ``"f1"`` (of label 1) or ``"matthews_correlation"``.
        one, other: predictions, 0 or 1, (seeds, examples). An example is drawn with all its seeds.
        labels: (examples,).
    """
    labels, draws = np.asarray(labels), _resamples(len(labels))

    def values(predictions: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return np.mean([_scores(metric, seed, labels, draws) for seed in predictions], 0)

    once = np.ones((1, len(labels)))
    difference = (values(one, once) - values(other, once))[0]
    return _interval(difference, values(one, draws) - values(other, draws))


def metric_of(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return a binary metric of predictions: accuracy, F1 of label 1, or Matthews correlation."""
    return float(_scores(metric, predictions, labels, np.ones((1, len(labels))))[0])


def _scores(metric: str, predictions, labels, draws) -> np.ndarray:
    """Return a metric for each row of ``draws``, which counts how often an example is drawn."""
    cells = [(1, 1), (1, 0), (0, 1), (0, 0)]  # prediction, label: tp, fp, fn, tn
    counts = [draws @ ((predictions == p) & (labels == y)) for p, y in cells]
    return _METRICS[metric](*counts)


def _f1(tp, fp, fn, tn):
    return _ratio(2 * tp, 2 * tp + fp + fn)


def _matthews(tp, fp, fn, tn):
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def _accuracy(tp, fp, fn, tn):
    return (tp + tn) / (tp + fp + fn + tn)


_METRICS = {"accuracy": _accuracy, "f1": _f1, "matthews_correlation": _matthews}


def _ratio(numerator, denominator):
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), 0)


def over_seeds(differences: list[float]) -> tuple[float, float, float]:
    """Return mean, standard error and p (t test, two-sided) of one difference per seed.

    Standard error and p are NaN for one seed.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan, math.nan
    error = values.std(ddof=1) / math.sqrt(len(values))
    p = float(ttest_1samp(values, 0).pvalue) if error else float(values.mean() == 0)
    return float(values.mean()), float(error), p


def mean_ratio(one: list[float], other: list[float]) -> tuple[Interval, float]:
    """Return the geometric mean of the ratios of positive values, and p of a t test of their logs.

    Args:
        one, other: values of the same runs, at least two.
    """
    test = ttest_1samp(np.log(one) - np.log(other), 0)
    bounds = test.confidence_interval(1 - LEVEL)
    mean = float(np.mean(np.log(one) - np.log(other)))
    return Interval(*map(math.exp, (mean, bounds.low, bounds.high))), float(test.pvalue)
