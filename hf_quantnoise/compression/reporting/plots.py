"""Plots of a finished compression run, and of the size of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers.utils import logging

from ...hub.card import DENSE, is_metric
from ...size import SENTINEL, SizeReport, SizeRow
from .figures import (
    GREY,
    bytes_axis,
    label,
    name_rows,
    new_figure,
    rows_of,
    save,
    show_sizes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)

PLOTS = "plots"
_COLUMNS = 3  # plots side by side


def plot_compression(history: Sequence[dict], report: SizeReport, folder: str) -> list[str]:
    """Plot size and metrics after each stage, and the error and size of each layer.

    ``report`` is that of the compressed model. The folder is created if missing.

    Returns:
        Paths of the PNG files; an empty list, with a warning, if matplotlib is not installed.
    """
    try:
        figures = {
            "stages.png": plot_stages(history, report),
            "layers.png": plot_layers(history, report),
        }
    except ImportError:
        logger.warning("no plots: install matplotlib (pip install 'hf-quantnoise[plots]')")
        return []
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        save(figure, path)
    return paths


def plot_sizes(report: SizeReport, per: str, title: str) -> Figure:
    """Plot the size of each group (``per="group"``) or layer in the file and in float32."""
    rows: dict[str, list[SizeRow]] = {}
    layers, other = {}, []
    for row in report.rows:
        if row.stored == SENTINEL or not (row.disk_bytes or row.dense_bytes):
            continue
        if per == "group":
            kind = "tied" if row.stored.startswith("tied") else row.stored
            rows.setdefault(f"{row.group} {kind}", []).append(row)
        elif row.group == "other":
            other.append(row)
        else:
            layers[row.name.removesuffix(".weight")] = row
    if per == "layer":
        rows = {
            name: [layers[each] for each in names] for name, names in rows_of([*layers]).items()
        }
        rows |= {f"{len(other)} other tensors": other} if other else {}
    figure = new_figure(len(rows))
    axes = figure.add_subplot()
    name_rows(axes, (name.partition(" ")[0] if per == "group" else name for name in rows))
    show_sizes(axes, list(rows.values()), summed=per == "group")
    total = report.total
    smaller = f", {total.times_smaller:.1f} times smaller than float32" if total.dense_bytes else ""
    figure.suptitle(f"{label(title)}: {total.disk_bytes / 1e6:.3f} MB{smaller}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def plot_stages(history: Sequence[dict], report: SizeReport) -> Figure:
    """Plot the size of the file and each metric after each stage, before and after finetuning."""
    metrics = [name for name, value in history[-1]["metric"].items() if is_metric(name, value)]
    names = ["mb", *(metrics or ["relative_error"])]
    columns = min(_COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure = new_figure(len(history), lines)
    plots = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for name, axes in zip(names, plots, strict=False):
        name_rows(axes, (record["stage"] for record in history))
        if name == "mb":
            _show_file(axes, history, report)
        else:
            _show_metric(axes, name, history)
    for axes in plots[len(names) :]:
        axes.set_visible(False)
    shown = {
        name: handle
        for axes in plots
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    place, handles = "outside lower center", list(shown.values())
    figure.legend(handles, list(shown), loc=place, ncols=len(shown), fontsize=8)
    return figure


def _show_file(axes: Axes, history: Sequence[dict], report: SizeReport) -> None:
    sizes = [1e6 * record["mb"] for record in history]
    axes.plot(sizes, range(len(history)), "o", label="after the stage")
    float32 = []
    if report.total.dense_bytes:
        float32 = [float(report.total.dense_bytes)]
        axes.axvline(float32[0], color=GREY, ls=":", label="float32")
    bytes_axis(axes, sizes + float32)
    axes.set_xlabel("size of the file", fontsize=9)


def _show_metric(axes: Axes, name: str, history: Sequence[dict]) -> None:
    values = [record["metric"].get(name, record["relative_error"]) for record in history]
    if history[0]["stage"] == DENSE and name in history[0]["metric"]:
        axes.axvline(values[0], color=GREY, ls="--", label="before compression")
    for number, (value, record) in enumerate(zip(values, history, strict=True)):
        if (packed := record["packed_metric"].get(name)) is not None:
            axes.plot(packed, number, "x", color="C1", label="just packed")
            axes.hlines(number, *sorted((packed, value)), color=GREY, lw=0.8, zorder=1)
    axes.plot(values, range(len(history)), "o", label="after the stage")
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=3)
    axes.set_xlabel(label(name.removeprefix("eval_").replace("_", " "), 26), fontsize=9)


def plot_layers(history: Sequence[dict], report: SizeReport) -> Figure:
    """Plot the relative error of each weight, and its size in the file and in float32."""
    errors = {name: e for record in history for name, e in record["layer_errors"].items()}
    found = [row for row in report.rows if row.stored != SENTINEL]
    tensors = {row.name.removesuffix(".weight"): row for row in found}
    rows = rows_of([name for name in tensors if name in errors])
    figure = new_figure(len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    name_rows(left, rows)
    points = [(errors[name], y) for y, names in enumerate(rows.values()) for name in names]
    left.scatter(*(zip(*points, strict=True) if points else ((), ())), 24, alpha=0.6)
    left.set_xlim(left=0)
    left.locator_params(axis="x", nbins=4)
    left.set_xlabel("relative error of the weight", fontsize=9)
    name_rows(right, rows)
    show_sizes(right, [[tensors[name] for name in names] for names in rows.values()])
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure
