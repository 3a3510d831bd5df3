"""Paired comparisons of methods at the same size, with the same seeds and optimizer steps."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from published import Study
from rows import METRICS, Run, by_seed, grouped
from significance import (
    LEVEL,
    Interval,
    bootstrap_mean,
    bootstrap_metric,
    mcnemar,
    mean_ratio,
    metric_of,
    over_seeds,
)
from tables import arms, markdown, task_title, tasks_of

NONE = "no difference shown"
LEAST_RUNS = 3  # to compare divergences over runs
SPLITS = {"dev": "divergence", "held_out": "divergence on held-out examples"}
UNTESTED = "not tested: the rows have no examples"


class Bootstraps:
    """Bootstrap intervals and scores of the majority class, computed once and stored.

    The intervals of F1 and Matthews correlation, and the majority class, need the labels, which
    are not in the repository. The stored values make the page from the rows alone.

    Args:
        path: JSON file of stored values.
        data_dir: folder with ``<task>/dev.parquet``; None if all values are stored.
    """

    def __init__(self, path: Path, data_dir: str | None = None) -> None:
        self.path, self.data_dir = path, data_dir
        self.stored = json.loads(path.read_text()) if path.is_file() else {}
        self.used: dict[str, dict] = {}

    def get(self, values: list, compute: Callable[[], Interval]) -> Interval:
        """Return the interval that belongs to some values, which identify it."""
        key = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
        if key not in self.used:
            self.used[key] = self.stored.get(key) or asdict(compute())
        return Interval(**self.used[key])

    def majority(self, task: str, metric: str) -> float:
        """Return the score on dev of always predicting the most frequent class of train."""
        key = f"majority {task} {metric}"
        if key not in self.used:
            self.used[key] = self.stored.get(key) or {"mean": self._majority(task, metric)}
        return self.used[key]["mean"]

    def _majority(self, task: str, metric: str) -> float:
        labels = np.asarray(self.labels(task))
        constant = np.full_like(labels, np.bincount(self.labels(task, "train")).argmax())
        return metric_of(metric, constant, labels)

    def labels(self, task: str, split: str = "dev") -> list[int]:
        """Return the labels of a split of a task."""
        if self.data_dir is None:
            raise ValueError(
                f"values of {task} are missing in {self.path.name}: pass --data_dir, the folder "
                f"with {task}/{split}.parquet"
            )
        from pandas import read_parquet

        return list(read_parquet(os.path.join(self.data_dir, task, f"{split}.parquet"))["label"])

    def text(self) -> str:
        """Return the content of the file: what was used."""
        return json.dumps(dict(sorted(self.used.items())), indent=0) + "\n"


def interval_of_metric(one: list[Run], other: list[Run], stored: Bootstraps) -> tuple | None:
    """Return the interval of a score's difference, and its name; None without predictions."""
    run, digits = one[0], [[r.per_example("correct") for r in side] for side in (one, other)]
    if any(values is None for side in digits for values in side):
        return None
    name = METRICS[run.metric].title if run.split == "dev" else "accuracy"

    def compute() -> Interval:
        right = [np.array([_digits(text) for text in side], dtype=float) for side in digits]
        if name == METRICS["accuracy"].title:
            return bootstrap_mean(*right)
        labels = np.asarray(stored.labels(run.task))
        predictions = [np.where(side == 1, labels, 1 - labels) for side in right]
        return bootstrap_metric(run.metric, *predictions, labels)

    return stored.get([name, *digits], compute), name


def _digits(text: str) -> list[int]:
    return [int(digit) for digit in text]


def compare_task(one: list[Run], other: list[Run], stored: Bootstraps) -> list[str]:
    """Return difference, interval, McNemar's p and verdict of two methods on a task.

    Args:
        one, other: runs with the same steps and seeds, in the same order.
        stored: of the intervals.
    """
    metric = METRICS[one[0].metric]
    if one[0].metric == "perplexity":
        return _compare_losses(one, other, stored, "perplexity", metric.decimals)
    cells = [_difference(one, other, one[0].metric, metric.factor, metric.decimals)]
    found = interval_of_metric(one, other, stored)
    if found is None:
        return [*cells, "", "", UNTESTED]
    interval, name = found
    right = [
        np.array([digit for run in side for digit in _digits(run.per_example("correct"))], bool)
        for side in (one, other)
    ]
    first, second, p = mcnemar(*right)
    is_shown = interval.shows_difference and (name != "accuracy" or p < LEVEL)
    bounds = f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f} ({name}, points)"
    p_cell = f"{p:.3g} ({first} to {second})"
    return [*cells, bounds, p_cell, verdict(is_shown, interval.mean > 0)]


def _compare_losses(
    one: list[Run], other: list[Run], stored: Bootstraps, name: str = "loss", decimals: int = 4
) -> list[str]:
    """Compare the losses of single examples; ``name`` is the score in the first cell."""
    cells = [_difference(one, other, name, 1, decimals)]
    losses = [[run.per_example("losses") for run in side] for side in (one, other)]
    if any(values is None for side in losses for values in side):
        return [*cells, "", "", UNTESTED]
    interval = stored.get(losses, lambda: bootstrap_mean(*map(np.asarray, losses)))
    bounds = f"{interval.low:+.4f} to {interval.high:+.4f} nats"
    return [*cells, bounds, "", verdict(interval.shows_difference, interval.mean < 0)]


def _difference(one: list[Run], other: list[Run], name: str, factor: float, decimals: int) -> str:
    differences = [a.scores[name] - b.scores[name] for a, b in zip(one, other, strict=True)]
    mean, error, _ = over_seeds(differences)
    return _with_error(factor * mean, factor * error, f"{{:+.{decimals}f}}".format)


def is_ahead(one: list[Run], other: list[Run]) -> bool:
    """Whether the mean over seeds of the first is better, shown by a test or not."""
    difference = np.mean([run.value for run in one]) - np.mean([run.value for run in other])
    return bool(difference > 0 if METRICS[one[0].metric].higher_is_better else difference < 0)


def same_steps(one: list[Run], other: list[Run]) -> bool:
    """Whether runs in the same order have the same steps, but for rounding of epochs (1%)."""
    pairs = zip(one, other, strict=True)
    return all(abs(a.steps - b.steps) <= 0.01 * max(a.steps, b.steps) for a, b in pairs)


def verdict(is_shown: bool, is_better: bool) -> str:
    """Return the word for a difference that a test shows or does not show."""
    return NONE if not is_shown else "better" if is_better else "worse"


def _with_error(mean: float, error: float, form: Callable[[float], str]) -> str:
    return form(mean) + ("" if np.isnan(error) else f" ± {form(error).lstrip('+')}")


def compare_average(one: dict, other: dict) -> list[str]:
    """Return the comparison of the mean over tasks of the share of float32, seed by seed.

    Args:
        one, other: seed -> task -> run, with the same seeds, tasks and steps.
    """
    sides = [{seed: list(runs.values()) for seed, runs in side.items()} for side in (one, other)]
    shares = [[np.mean([r.kept for r in runs]) for runs in side.values()] for side in sides]
    mean, error, p = over_seeds([float(a - b) for a, b in zip(*shares, strict=True)])
    cells = [_with_error(100 * mean, 100 * error, "{:+.1f}".format)]
    runs = next(iter(sides[0].values()))
    if np.isnan(p):
        return [*cells, "", "", "not tested: one seed"]
    beyond = "beyond" if abs(mean) > 2 * error else "within"
    is_better = (mean > 0) == METRICS[runs[0].metric].higher_is_better
    cells += [f"{beyond} two standard errors", f"{p:.3g} (t test, {len(one)} seeds)"]
    return [*cells, verdict(p < LEVEL, is_better)]


def compare_divergences(one: list[Run], other: list[Run], split: str) -> list[str]:
    """Return title and comparison of the divergences from float32, over all tasks and seeds.

    Args:
        one, other: runs in the same order, at least two, with the same steps.
        split: the examples: ``"dev"``, or ``"held_out"``.
    """
    sides = [[run.row[split]["divergence"] for run in side] for side in (one, other)]
    lower = sum(a < b for a, b in zip(*sides, strict=True))
    interval, p = mean_ratio(*sides)
    mean, *bounds = (
        f"{100 * (ratio - 1):+.1f}%" for ratio in (interval.mean, interval.low, interval.high)
    )
    return [
        f"{SPLITS[split]} (lower in {lower} of {len(one)} runs)",
        mean,
        " to ".join(bounds),
        f"{p:.3g} (t test, {len(one)} runs)",
        verdict(p < LEVEL, interval.mean < 1),
    ]


def comparisons_table(runs: list[Run], study: Study, stored: Bootstraps) -> str:
    """Return the comparisons of each method with the study's references, by size."""
    rows = []
    for same_size in grouped(arms(runs), lambda arm: arm[0].size).values():
        references = [arm for arm in same_size if study.is_reference(arm[0].method)]
        if order := study.references:  # each is compared with those before it
            references.sort(key=lambda arm: order.index(arm[0].method))
        others = [arm for arm in same_size if arm not in references]
        for index, reference in enumerate(references):
            for arm in [*references[index + 1 :], *others]:
                rows += _compare(arm, reference, stored)
    header = ["size", "methods", "task", "difference", "interval of 95%", "p", "the first is"]
    return markdown(header, rows)


def _compare(arm: list[Run], reference: list[Run], stored: Bootstraps) -> list[list[str]]:
    """Return a row for each task with common seeds and equal steps, and one for their average."""
    names = [arm[0].size or "", f"{arm[0].method} - {reference[0].method}"]
    tasks = [task for task in tasks_of(arm) if task in tasks_of(reference)]
    rows, compared, ahead = [], [], 0
    runs: tuple[list[Run], list[Run]] = ([], [])
    for task in tasks:
        sides = [
            {r.seed: r for r in sorted(side, key=lambda r: r.seed) if r.task == task}
            for side in (arm, reference)
        ]
        seeds = [seed for seed in sides[0] if seed in sides[1]]
        pair = [[side[seed] for seed in seeds] for side in sides]
        if not seeds or not same_steps(*pair):
            continue
        compared.append(task)
        ahead += is_ahead(*pair)
        for own, found in zip(runs, pair, strict=True):
            own.extend(found)
        rows.append([*names, task_title(task), *compare_task(*pair, stored)])
        if pair[0][0].metric != "perplexity" and pair[0][0].per_example("losses"):
            losses = _compare_losses(*pair, stored)
            rows.append([*names, f"{task_title(task)}, loss", *losses])
    sides = [by_seed(run for run in side if run.task in compared) for side in (arm, reference)]
    seeds = [seed for seed in sides[0] if seed in sides[1]]
    if len(compared) > 1 and seeds:
        pair = ({seed: side[seed] for seed in seeds} for side in sides)
        title = f"average % of float32 (ahead on {ahead} of {len(compared)})"
        rows.append([*names, title, *compare_average(*pair)])
        if len(runs[0]) >= LEAST_RUNS:
            splits = [
                name for name in SPLITS if all(name in run.row for run in [*runs[0], *runs[1]])
            ]
            rows += [[*names, *compare_divergences(*runs, split)] for split in splits]
    return rows
