"""What a pass tells while it runs: its figures in the trainer's logs, and plots at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging

from ...hub.card import is_metric, plain_metrics
from ...modeling import packed_layers
from ...quantizers import ProductQuantizer
from ...size import SizeReport

if TYPE_CHECKING:
    from .record import StageRecord

logger = logging.get_logger(__name__)

PLOTS = "plots"
_PREFIX = "compression_"


def codebook_use(model: nn.Module) -> float | None:
    """Share of all centroids that some block is assigned to; None without codebooks."""
    used = total = 0
    seen: set[int] = set()
    for _, layer in packed_layers(model):
        is_new = id(layer.weight_indices) not in seen
        if isinstance(layer.quantizer, ProductQuantizer) and is_new:
            seen.add(id(layer.weight_indices))
            counts = layer.block_counts()
            used += int((counts > 0).sum())
            total += len(counts)
    return used / total if total else None


class ForwardLogs(TrainerCallback):
    """Hands the logs of a stage's trainer on to the run's own, with steps that go on counting.

    Args:
        trainer: the run's trainer, whose ``report_to`` shows them.
        stage: number of the stage.
    """

    def __init__(self, trainer: Trainer, stage: int) -> None:
        self.trainer, self.stage = trainer, stage
        self.first_step = trainer.state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Logs what was logged, each name with ``compression_`` before it."""
        self.trainer.state.global_step = self.first_step + state.global_step
        figures = {f"{_PREFIX}{name}": value for name, value in (logs or {}).items()}
        self.trainer.log({**figures, f"{_PREFIX}stage": self.stage})


def forward_logs(stage_trainer: Trainer, trainer: Trainer, number: int) -> None:
    """Lets a stage's figures appear in the run's logs, and there alone."""
    stage_trainer.add_callback(ForwardLogs(trainer, number))
    stage_trainer.remove_callback(PrinterCallback)  # the run's own prints them


def log_errors(trainer: Trainer, errors: dict[str, float], stage: int) -> None:
    """The relative errors of the layers just packed in the run's logs."""
    if errors:
        figures = {f"{_PREFIX}error/{name}": error for name, error in errors.items()}
        trainer.log({**figures, f"{_PREFIX}stage": stage})


def log_record(trainer: Trainer, record: StageRecord, number: int, clean: dict[str, float]) -> None:
    """The figures of a finished stage in the run's logs, and beside its metrics, which ``evaluate``
    has logged, those of the dense model."""
    figures = {"stage": number, "mb": record.mb, "relative_error": record.relative_error}
    if record.codebook_use is not None:
        figures["codebook_use"] = record.codebook_use
    figures |= {f"clean_{name}": value for name, value in plain_metrics(clean).items()}
    trainer.log({f"{_PREFIX}{name}": value for name, value in figures.items()})


def plot_compression(history: Sequence[dict], report: SizeReport, folder: str) -> list[str]:
    """Draws a finished pass: metrics against bytes per stage, error and bytes per layer.

    Args:
        history: ``trainer.compression_history``.
        report: ``size_report`` of the compressed model.
        folder: where the PNG files go; made where it is missing.

    Returns:
        Paths of the files; none, with a warning, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plots: matplotlib is missing (pip install 'hf-quantnoise[plots]')")
        return []
    os.makedirs(folder, exist_ok=True)
    drawn = {"stages.png": _stages(Figure, history), "layers.png": _layers(Figure, history, report)}
    paths = []
    for name, figure in drawn.items():
        paths.append(os.path.join(folder, name))
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
    return paths


def _stages(figure_class, history: Sequence[dict]):
    names = [name for name, value in history[-1]["metric"].items() if is_metric(name, value)]
    figure = figure_class(figsize=(5 * max(len(names), 1), 4))
    megabytes = [record["mb"] for record in history]
    for place, name in enumerate(names or ["relative_error"]):
        axes = figure.add_subplot(1, max(len(names), 1), place + 1)
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


def _layers(figure_class, history: Sequence[dict], report: SizeReport):
    errors = {name: e for record in history for name, e in record["layer_errors"].items()}
    sizes: dict[str, float] = {}
    for row in report.rows:  # a sentinel is a row of its own
        name = row.name.removesuffix(".weight")
        sizes[name] = sizes.get(name, 0.0) + row.disk_bytes / 1e3
    names = [name for name in sizes if name in errors]
    figure = figure_class(figsize=(10, 1 + 0.18 * len(names)))
    columns = (("relative error of the weight", errors), ("kB on disk", sizes))
    for place, (label, values) in enumerate(columns):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.barh(range(len(names)), [values[name] for name in names])
        axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names), fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel(label)
    return figure
