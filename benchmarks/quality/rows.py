"""Rows of the quality studies, read and grouped for the report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its name, its factor, its decimals, and which direction is better."""

    title: str
    factor: float = 100
    decimals: int = 1
    higher_is_better: bool = True

    def show(self, value: float) -> str:
        """Return a value of the metric as text."""
        return f"{self.factor * value:.{self.decimals}f}"


METRICS = {
    "accuracy": Metric("accuracy"),
    "matthews_correlation": Metric("Matthews correlation"),
    "f1": Metric("F1"),
    "perplexity": Metric("perplexity", 1, 2, higher_is_better=False),
}
TASKS = {
    "sst2": "SST-2",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "rte": "RTE",
    "cifar10": "CIFAR-10",
    "wikitext2": "WikiText-2",
}


@dataclass(frozen=True)
class Run:
    """One row: a method on a task, with one seed."""

    study: str
    model: str
    task: str
    method: str
    size: str | None
    seed: int
    split: str  # "dev" or "held_out", which the scores belong to
    metric: str  # key of METRICS
    scores: dict[str, float] = field(hash=False)
    float32: dict[str, float] = field(hash=False)
    row: dict = field(hash=False, repr=False)

    @property
    def value(self) -> float:
        """The metric, in natural units."""
        return self.scores[self.metric]

    @property
    def start(self) -> float:
        """The metric of the float32 model that the run began with."""
        return self.float32[self.metric]

    @property
    def kept(self) -> float:
        """The metric as a share of that of float32 (above 1 is worse for a perplexity)."""
        return self.value / self.start

    @property
    def megabytes(self) -> float:
        return self.row["bytes"] / 1e6

    @property
    def times_smaller(self) -> float:
        return self.row["float32_bytes"] / self.row["bytes"]

    @property
    def steps(self) -> int:
        return self.row["steps"]

    @property
    def minutes(self) -> float:
        """Without the time for which the process was stopped by hand, which its row names."""
        return (self.row["seconds"] - self.row.get("paused_seconds", 0)) / 60

    def per_example(self, name: str):
        """Return ``"correct"`` (digits) or ``"losses"`` (nats) of each example; None if missing."""
        return self.row.get(f"{self.split}_{name}")

    @property
    def arm(self) -> tuple:
        """Everything but task and seed."""
        return (self.study, self.model, self.split, self.size, self.method)


def run_of(row: dict, split: str) -> Run:
    """Return the run of a row, with its scores on a split.

    Raises:
        ValueError: naming the field that is missing.
    """
    key = row["key"]
    try:
        scores = row[split]
        metric = next(name for name in scores if name in METRICS)
        float32 = row[f"{split}_float32"]
        names = ("study", "model", "task", "method", "size", "seed")
        for name in ("bytes", "float32_bytes", "steps", "seconds"):
            row[name]
        return Run(*(key[name] for name in names), split, metric, scores, float32, row)
    except KeyError as error:
        raise ValueError(f"invalid row {key}: the field {error} is missing") from None
    except StopIteration:
        known = ", ".join(METRICS)
        raise ValueError(f"invalid row {key}: no metric in {split!r}; expected {known}") from None


def read_rows(folder: Path, studies: Iterable[str]) -> list[dict]:
    """Return the rows of the files ``quality_<study>.jsonl`` of a folder.

    Raises:
        ValueError: if one of them has a row of another study.
    """
    studies = list(studies)
    rows = [row for study in studies for row in read_file(folder / f"quality_{study}.jsonl")]
    for row in rows:
        if row["key"]["study"] not in studies:
            raise ValueError(
                f"invalid row {row['key']}: unknown study, expected one of {', '.join(studies)}; "
                "add it to published.py"
            )
    return rows


def is_baseline(row: dict) -> bool:
    """Whether a row is the training of a float32 model, of which several settings are tried."""
    return row["key"].get("size") is None


def runs_of(rows: Iterable[dict], split: str = "dev") -> list[Run]:
    """Return the runs of rows, scored on a split, without those of float32 models.

    Raises:
        ValueError: if a row lacks a field, or two rows have the same method, size, task and seed.
    """
    runs, settings = {}, {}
    for run in (run_of(row, split) for row in rows if not is_baseline(row)):
        place = (*run.arm, run.task, run.seed)
        if place in runs:
            raise ValueError(
                f"two rows of {place}: give rows with different settings different methods"
            )
        runs[place] = run
        setting = json.dumps(run.row["key"].get("setting"), sort_keys=True)
        if settings.setdefault(place[:-1], setting) != setting:
            raise ValueError(f"rows of {place[:-1]} have different settings for different seeds")
    return list(runs.values())


def read_file(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines; an empty list if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def grouped(runs: Iterable[Run], name) -> dict:
    """Return the runs by a property (a name, or a function), in the order of their appearance."""
    groups: dict = {}
    for run in runs:
        groups.setdefault(name(run) if callable(name) else getattr(run, name), []).append(run)
    return groups


def by_seed(runs: Iterable[Run]) -> dict[int, dict[str, Run]]:
    """Return seed -> task -> run of one arm, with the seeds that have every task of the arm."""
    runs = list(runs)
    tasks = {run.task for run in runs}
    seeds = grouped(runs, "seed")
    return {
        seed: {run.task: run for run in rows}
        for seed, rows in sorted(seeds.items())
        if {run.task for run in rows} == tasks
    }
