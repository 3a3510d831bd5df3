"""Metrics of a compression run in the logs of the trainer that started it."""

from __future__ import annotations

from transformers import PrinterCallback, Trainer, TrainerCallback

from ...hub.card import plain_metrics
from .record import StageRecord


class ForwardLogs(TrainerCallback):
    """Forwards the logs of a stage to the run's trainer and continues its step count."""

    def __init__(self, trainer: Trainer, stage: int) -> None:
        self.trainer, self.stage = trainer, stage
        self.first_step = trainer.state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.trainer.state.global_step = self.first_step + state.global_step
        _log(self.trainer, {**(logs or {}), "stage": self.stage})


def forward_logs(stage_trainer: Trainer, trainer: Trainer, number: int) -> None:
    """Report the logs of a stage's trainer through the run's trainer only."""
    stage_trainer.add_callback(ForwardLogs(trainer, number))
    stage_trainer.remove_callback(PrinterCallback)  # the run's trainer prints them


def log_errors(trainer: Trainer, errors: dict[str, float], stage: int) -> None:
    """Log the relative errors of the layers that were just packed."""
    if errors:
        _log(trainer, {**{f"error/{name}": e for name, e in errors.items()}, "stage": stage})


def log_record(trainer: Trainer, record: StageRecord, number: int, dense: dict[str, float]) -> None:
    """Log the record of a finished stage, and the metrics of the dense model for comparison.

    The stage's own metrics are logged by ``evaluate``.
    """
    values = {"stage": number, "mb": record.mb, "relative_error": record.relative_error}
    if record.codebook_use is not None:
        values["codebook_use"] = record.codebook_use
    _log(trainer, values | {f"clean_{name}": v for name, v in plain_metrics(dense).items()})


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    trainer.log({f"compression_{name}": value for name, value in values.items()})
