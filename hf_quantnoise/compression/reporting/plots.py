"""Plots of a finished compression run."""

from __future__ import annotations

import os
from collections.abc import Sequence

from transformers.utils import logging

from ...hub.card import is_metric
from ...size import SizeReport

logger = logging.get_logger(__name__)

PLOTS = "plots"


def plot_compression(history: Sequence[dict], report: SizeReport, folder: str) -> list[str]:
    """Plot the metric against the size after each stage, and the error and size of each layer.

    Args:
        history: ``trainer.compression_history``.
        report: ``size_report`` of the compressed model.
        folder: where the PNG files are written; created if missing.

    Returns:
        Paths of the files; an empty list, with a warning, if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plots: install matplotlib (pip install 'hf-quantnoise[plots]')")
        return []
    os.makedirs(folder, exist_ok=True)
    figures = {
        "stages.png": _plot_stages(Figure, history),
        "layers.png": _plot_layers(Figure, history, report),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(os.path.join(folder, name))
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
    return paths


def _plot_stages(figure_class, history: Sequence[dict]):
    names = [name for name, value in history[-1]["metric"].items() if is_metric(name, value)]
    figure = figure_class(figsize=(5 * max(len(names), 1), 4))
    megabytes = [record["mb"] for record in history]
    for column, name in enumerate(names or ["relative_error"]):
        axes = figure.add_subplot(1, max(len(names), 1), column + 1)
        values = [record["metric"].get(name, record["relative_error"]) for record in history]
        axes.plot(megabytes, values, marker="o", label="finetuned")
        trained = [record for record in history if name in record["packed_metric"]]
        if trained:
            packed = [record["packed_metric"][name] for record in trained]
            axes.plot([record["mb"] for record in trained], packed, "x", label="just packed")
            axes.legend()
        for x, y, record in zip(megabytes, values, history, strict=True):
            axes.annotate(record["stage"], (x, y), xytext=(4, 4), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_xlabel("MB on disk")
        axes.set_ylabel(name.removeprefix("eval_"))
        axes.grid(alpha=0.3)
    return figure


def _plot_layers(figure_class, history: Sequence[dict], report: SizeReport):
    errors = {name: e for record in history for name, e in record["layer_errors"].items()}
    sizes: dict[str, float] = {}
    for row in report.rows:  # a sentinel has its own row
        name = row.name.removesuffix(".weight")
        sizes[name] = sizes.get(name, 0.0) + row.disk_bytes / 1e3
    names = [name for name in sizes if name in errors]
    figure = figure_class(figsize=(10, 1 + 0.18 * len(names)))
    columns = (("relative error of the weight", errors), ("kB on disk", sizes))
    for column, (label, values) in enumerate(columns):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.barh(range(len(names)), [values[name] for name in names])
        axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names), fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel(label)
    return figure
