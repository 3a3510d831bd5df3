"""What is noted of each stage of a pass."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import Trainer

from ...hub.card import format_metrics
from ...modeling.packer import StageResult
from ...size import size_report
from .logs import codebook_use

_PACKED = "packed"


@dataclass
class StageRecord:
    """What one stage did.

    Attributes:
        stage: structure group or regex; ``"dense"`` for the model before the pass,
            ``"restructured"`` after layers were taken out or shared.
        layers: number of layers packed in it.
        relative_error: ||W - W_q||^2 / ||W||^2 over those layers, before finetuning.
        metric: what ``evaluate`` gave after the stage's finetuning; empty without an eval set.
        packed_metric: what it gave before, with the stage's layers just packed; empty where nothing
            was finetuned.
        mb: size on disk so far, in 10^6 bytes.
        seconds: wall time of the stage.
        finetuning: what the stage's ``train`` returned; empty without finetuning.
        layer_errors: ||W - W_q||^2 / ||W||^2 of each weight packed in it, before finetuning.
        codebook_use: share of all centroids so far that some block is assigned to.
        step: optimizer steps of the run and of the pass up to here, as the logs count them.
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
        """A JSON-able dict."""
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.stage:<12} {self.layers:>4} layers  relative error {self.relative_error:.4f}  "
            f"{self.mb:8.3f} MB  {self.seconds:7.1f} s  "
            f"{format_metrics(self.metric)}"
        )


def record_of(
    stage: str,
    stage_trainer: Trainer,
    start: float,
    packed: StageResult | None = None,
    finetuning: dict[str, float] | None = None,
    packed_metric: dict[str, float] | None = None,
) -> StageRecord:
    """Evaluates, and puts a stage's figures together.

    Args:
        stage: its name.
        stage_trainer: has the model as the stage left it.
        start: ``time.perf_counter()`` at its beginning.
        packed: what packing it did.
        finetuning, packed_metric: as in :class:`StageRecord`.
    """
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


def metric_when_packed(stage_trainer: Trainer) -> dict[str, float]:
    """What ``evaluate`` gives before a stage is finetuned, in the logs as ``packed_...``. Random
    numbers go on as if it had not run."""
    if stage_trainer.eval_dataset is None:
        return {}
    with torch.random.fork_rng(devices=[]):  # evaluation draws the seed of its loader
        found = stage_trainer.evaluate(metric_key_prefix=_PACKED)
    return {name.replace(_PACKED, "eval", 1): value for name, value in found.items()}
