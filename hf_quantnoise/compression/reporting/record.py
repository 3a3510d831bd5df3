"""Measurements of each stage of a compression run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from ...hub.card import format_metrics
from ...modeling import packed_layers
from ...modeling.packer import StageResult
from ...publishing.tables import history_rows
from ...size import size_report
from ...tables import data_frame, html_table

if TYPE_CHECKING:
    from pandas import DataFrame

_PACKED = "packed"
_METRICS = ("metric", "packed_metric", "finetuning")  # fields of a record that are dicts of them


@dataclass
class StageRecord:
    """Measurements of one stage.

    Attributes:
        stage: structure group or regex; ``"dense"`` for the model before compression, or ``"latent
            weights"`` if noise of rate 1 has trained it: they are scored without quantization, and
            are not a baseline. ``"restructured"`` after layers were pruned or shared.
        layers: number of layers packed in the stage.
        relative_error: ||W - W_q||^2 / ||W||^2 over those layers, before finetuning.
        metric: result of ``evaluate`` after finetuning; empty without an eval set.
        packed_metric: result of ``evaluate`` after packing, before finetuning; empty if the stage
            is not finetuned.
        mb: size on disk after the stage, in 10^6 bytes.
        seconds: wall time of the stage; of a resumed stage that since the run was resumed.
        finetuning: metrics of the stage's ``train``; empty without finetuning. If it was resumed
            from a checkpoint, without its mean loss and speed, which would be of the steps since.
        layer_errors: ||W - W_q||^2 / ||W||^2 of each weight packed in the stage, before finetuning.
        codebook_use: fraction of all centroids so far that some block is assigned to.
        step: optimizer steps of the training run and the compression run so far, as logged.
    """

    stage: str
    layers: int
    relative_error: float
    mb: float
    seconds: float
    metric: dict[str, float] = field(default_factory=dict)
    packed_metric: dict[str, float] = field(default_factory=dict)
    finetuning: dict[str, float] = field(default_factory=dict)
    layer_errors: dict[str, float] = field(default_factory=dict)
    codebook_use: float | None = None
    step: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, which can be written as JSON."""
        return asdict(self)

    def line(self) -> str:
        """Return a one-line summary."""
        return (
            f"{self.stage:<14} {self.layers:>4} layers  relative error {self.relative_error:.4f}  "
            f"{self.mb:8.3f} MB  {self.seconds:7.1f} s  {format_metrics(self.metric)}"
        )


class CompressionHistory(list):
    """A list with the fields of each :class:`StageRecord` as a dict; notebooks show a table."""

    def to_pandas(self) -> DataFrame:
        """Return a ``pandas.DataFrame`` with a row per stage.

        Metrics have separate columns: ``metric.eval_loss``, ``packed_metric.eval_loss``,
        ``finetuning.train_loss``. The column ``layer_errors`` has dicts.
        """
        return data_frame(
            {
                f"{name}.{key}" if key else name: each
                for name, value in record.items()
                for key, each in (value.items() if name in _METRICS else [("", value)])
            }
            for record in self
        )

    def _repr_html_(self) -> str:
        head, rows = history_rows(self)
        return html_table([head, *rows], left=1)


def measure_stage(
    stage: str,
    stage_trainer: Trainer,
    start: float,
    packed: StageResult | None = None,
    finetuning: dict[str, float] | None = None,
    packed_metric: dict[str, float] | None = None,
) -> StageRecord:
    """Evaluate the model at the end of a stage, which began at ``start``, and return its record."""
    metric = {} if stage_trainer.eval_dataset is None else stage_trainer.evaluate()
    return StageRecord(
        stage=stage,
        layers=len(packed.layers) if packed else 0,
        relative_error=packed.relative_error if packed else 0.0,
        mb=size_report(stage_trainer.model).total.disk_bytes / 1e6,
        metric=metric,
        packed_metric=packed_metric or {},
        seconds=time.perf_counter() - start,
        finetuning=finetuning or {},
        layer_errors=packed.errors if packed else {},
        codebook_use=codebook_use(stage_trainer.model),
    )


def evaluate_packed(stage_trainer: Trainer) -> dict[str, float]:
    """Evaluate a stage before its finetuning, logged with the prefix ``packed_``.

    The state of the random number generator does not change.
    """
    if stage_trainer.eval_dataset is None:
        return {}
    with torch.random.fork_rng(devices=[]):  # the evaluation loader draws a seed
        metrics = stage_trainer.evaluate(metric_key_prefix=_PACKED)
    return {name.replace(_PACKED, "eval", 1): value for name, value in metrics.items()}


def codebook_use(model: nn.Module) -> float | None:
    """Return the fraction of centroids that some block is assigned to; None without codebooks."""
    layers = {
        id(layer.weight_indices): layer
        for _, layer in packed_layers(model)
        if layer.quantizer.has_codebook
    }
    used = [used for layer in layers.values() for used in (layer.block_counts() > 0).tolist()]
    return sum(used) / len(used) if used else None
