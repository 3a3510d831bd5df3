"""Plots of a finished compression run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers.utils import logging

from ...hub.card import is_metric
from ...size import SizeReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)

PLOTS = "plots"


def plot_compression(history: Sequence[dict], report: SizeReport, folder: str) -> list[str]:
    """Plot the metric against the size after each stage, and the error and size of each layer.

    ``report`` is that of the compressed model. The folder is created if missing.

    Returns:
        Paths of the PNG files; an empty list, with a warning, if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plots: install matplotlib (pip install 'hf-quantnoise[plots]')")
        return []
    os.makedirs(folder, exist_ok=True)
    figures = {"stages.png": Figure(), "layers.png": Figure()}
    _plot_stages(figures["stages.png"], history)
    _plot_layers(figures["layers.png"], history, report)
    paths = [os.path.join(folder, name) for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=120, bbox_inches="tight")
    return paths


def _plot_stages(figure: Figure, history: Sequence[dict]) -> None:
    metrics = [name for name, value in history[-1]["metric"].items() if is_metric(name, value)]
    names = metrics or ["relative_error"]
    figure.set_size_inches(5 * len(names), 4)
    megabytes = [record["mb"] for record in history]
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        values = [record["metric"].get(name, record["relative_error"]) for record in history]
        axes.plot(megabytes, values, marker="o", label="finetuned")
        trained = [record for record in history if name in record["packed_metric"]]
        if trained:
            packed = [record["packed_metric"][name] for record in trained]
            axes.plot([record["mb"] for record in trained], packed, "x", label="just packed")
            axes.legend()
        for x, y, record in zip(megabytes, values, history, strict=True):
            axes.annotate(record["stage"], (x, y), xytext=(4, 4), textcoords="offset points")
        axes.set(xscale="log", xlabel="MB on disk", ylabel=name.removeprefix("eval_"))
        axes.grid(alpha=0.3)


def _plot_layers(figure: Figure, history: Sequence[dict], report: SizeReport) -> None:
    errors = {name: e for record in history for name, e in record["layer_errors"].items()}
    sizes: dict[str, float] = {}
    for row in report.rows:  # a sentinel has its own row
        name = row.name.removesuffix(".weight")
        sizes[name] = sizes.get(name, 0.0) + row.disk_bytes / 1e3
    names = [name for name in sizes if name in errors]
    figure.set_size_inches(10, 1 + 0.18 * len(names))
    left, right = figure.subplots(1, 2)
    for axes, values in ((left, errors), (right, sizes)):
        axes.barh(range(len(names)), [values[name] for name in names])
        axes.invert_yaxis()
    left.set_yticks(range(len(names)), names, fontsize=6)
    left.set_xlabel("relative error of the weight")
    right.set_yticks(range(len(names)), [""] * len(names))
    right.set_xlabel("kB on disk")
