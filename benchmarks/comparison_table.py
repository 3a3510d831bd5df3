"""The tables of ``comparison.py``: one line per form of each model."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from comparison_checkpoints import CHECKPOINTS
from comparison_forms import forms
from results_file import provenance
from rows import METRICS, read_file, runs_of
from speed import BASE
from tables import markdown, mean_and_spread, times


def tables(lines: list[dict], trained: str | os.PathLike) -> str:
    """Return a table per model that has rows, and where they come from.

    Args:
        lines: of the results file.
        trained: folder of ``quality_*.jsonl``, whose rows of trained models are shown too.

    Raises:
        ValueError: if no form was measured.
    """
    found = []
    for name, kind in CHECKPOINTS.items():
        own = [line for line in lines if line["key"]["model"] == name]
        if any(line["key"].get("form") == BASE for line in own):
            found += [f"## {kind.title}", "", ModelTable(kind, own, Path(trained)).text(), ""]
    if not found:
        raise ValueError("--results has no float32 form; run the benchmark without --table first")
    return "\n".join([*found, "\n\n".join(provenance(lines))])


class ModelTable:
    """The table of one model."""

    def __init__(self, kind, lines: list[dict], trained: Path) -> None:
        self.kind, self.metric = kind, METRICS[kind.metric]
        quality = {}  # the last line of each form and seed
        for line in lines:
            if line["key"]["part"] == "quality":
                quality[line["key"]["form"], line["key"]["seed"]] = line
        self.quality: dict[str, list[dict]] = {}
        for (form, _), line in quality.items():
            self.quality.setdefault(form, []).append(line)
        latest = {line["key"].get("case"): line for line in lines if "form" not in line["key"]}
        self.load = latest.pop(None, {"seconds": {}})["seconds"]
        self.latency = {case: line["forms"] for case, line in latest.items()}
        file, study, method = kind.trained
        rows = (row for row in read_file(trained / file) if _is_of(row, study, kind.task, method))
        self.trained: dict[str, list] = {}
        for run in runs_of(rows):
            self.trained.setdefault(run.size, []).append(run)

    def text(self) -> str:
        """Return the table in Markdown."""
        rows = []
        for form in forms(self.kind.sizes):
            rows.append(self._row(form))
            size = form.name.removeprefix("packed ")
            if size in self.trained and form.name in self.quality:
                rows.append(self._trained_row(size))
        unit = "MB" if self._bytes(BASE) > 10e6 else "kB"
        header = ["form", unit, "smaller", self.metric.title, "loss", "divergence"]
        cases = [f"{case}, speed" for case in self.latency]
        return markdown([*header, *cases, "load, s", "stays dense"], rows)

    def _row(self, form) -> list[str]:
        measured = [line for line in self.quality.get(form.name, []) if "failed" not in line]
        if not measured:
            failed = [line["failed"] for line in self.quality.get(form.name, [])]
            reason = (failed or [form.missing or form.missing_package() or "not run"])[-1]
            return [form.name, *["-"] * (6 + len(self.latency)), f"not measured: {reason}"]
        scores = [line["dev"] for line in measured]
        return [
            form.name,
            *self._size_cells(statistics.mean(line["bytes"] for line in measured)),
            *self._score_cells(scores),
            *self._speed_cells(form.name),
            self._dense_cell(measured[0]["dense"]),
        ]

    def _trained_row(self, size: str) -> list[str]:
        """Return the scores of trained models, whose files have the layers of the one-shot one."""
        runs, files = self.trained[size], self.quality[f"packed {size}"][0].get("files", {})
        beside = sum(n for name, n in files.items() if name != "model.safetensors")
        size_cells = self._size_cells(statistics.mean(run.row["bytes"] for run in runs) + beside)
        steps = f"{runs[0].steps:,} steps, {_count(len(runs), 'seed')}"
        row = [f"packed {size}, trained ({steps})", *size_cells]
        row += self._score_cells([run.scores for run in runs])
        return [*row, *["as above"] * (len(self.latency) + 2)]

    def _bytes(self, form: str) -> float:
        return statistics.mean(line["bytes"] for line in self.quality[form])

    def _size_cells(self, size: float) -> list[str]:
        dense = self._bytes(BASE)
        shown = f"{size / 1e6:.2f}" if dense > 10e6 else f"{size / 1e3:.1f}"
        return [shown, times(dense / size)]

    def _score_cells(self, scores: list[dict]) -> list[str]:
        shows: dict[str, Callable[[float], str]] = {
            self.kind.metric: self.metric.show,
            "loss": "{:.3f}".format,
            "divergence": lambda value: f"{round(value, 4) + 0.0:.4f}",  # not -0.0000
        }
        return [mean_and_spread([s[name] for s in scores], show) for name, show in shows.items()]

    def _speed_cells(self, form: str) -> list[str]:
        cells = []
        for found in self.latency.values():
            ms = f" ({found[BASE]['ms']:.3g} ms)" if form == BASE else ""
            cells.append(f"{found[form]['speed']:.2f}{ms}" if form in found else "-")
        return [*cells, f"{self.load[form]:.2f}" if form in self.load else "-"]

    def _dense_cell(self, dense: dict[str, int]) -> str:
        """Return which matrices are dense, with their share of the values of all matrices."""
        every = self.quality[BASE][0]["dense"]
        if not dense or dense.keys() == every.keys():
            return "all" if dense else "nothing"
        lookups = [name for name in every if "embed" in name]
        layers = [name for name in every if name not in lookups]
        words: list[str] = []
        for label, group in (("tables", lookups), ("Linear layers", layers)):
            names = [name for name in group if name in dense]
            words += [label] if names == group else _leaves(names)
        share = sum(dense.values()) / sum(every.values())
        return f"{', '.join(words)} ({100 * share:.0f}%)"


def _leaves(names: Iterable[str]) -> list[str]:
    """Return the names of modules without those of their parents, each once."""
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(p[-3] if p[-2] in ("dense", "0") else p[-2] for p in parts))


def _is_of(row: dict, study: str, task: str, method: str) -> bool:
    key = row["key"]
    return (key["study"], key["task"], key["method"]) == (study, task, method)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
