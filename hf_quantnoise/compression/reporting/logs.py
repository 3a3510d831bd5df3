"""Metrics of a compression run in the logs of the trainer that started it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from ...hub.card import plain_metrics
from .console import name_bars, not_printed, silence_if_quiet
from .record import StageRecord

GROUP = "compression/"  # begins the name of each figure


class ForwardLogs(TrainerCallback):
    """Forwards the logs of a stage to the run's trainer and continues its step count."""

    def __init__(self, stage_trainer: Trainer, trainer: Trainer, stage: int, name: str) -> None:
        self.stage_trainer, self.trainer = stage_trainer, trainer
        self.stage, self.name = stage, name
        self.first_step = trainer.state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.trainer.state.global_step = self.first_step + state.global_step
        _log(self.trainer, {**(logs or {}), "stage": self.stage})

    def on_train_begin(self, args, state, control, **kwargs):
        name_bars(self.stage_trainer, self.name)

    def on_prediction_step(self, args, state, control, **kwargs):
        name_bars(self.stage_trainer, self.name)


def forward_logs(stage_trainer: Trainer, trainer: Trainer, number: int, name: str) -> None:
    """Report the logs of a stage's trainer through the run's trainer only."""
    stage_trainer.add_callback(ForwardLogs(stage_trainer, trainer, number, name))
    stage_trainer.remove_callback(PrinterCallback)  # the run's trainer prints them
    silence_if_quiet(stage_trainer)


def log_errors(trainer: Trainer, errors: dict[str, float], stage: int) -> None:
    """Log the relative errors of the layers that were just packed.

    Every reporter gets the median and the maximum, TensorBoard and Weights & Biases a histogram.
    """
    if not errors:
        return
    values = list(errors.values())
    figures = {"layer_error_median": median(values), "layer_error_max": max(values)}
    with not_printed(trainer):
        _log(trainer, {**figures, "stage": stage})
    if trainer.is_world_process_zero():
        callbacks = trainer.callback_handler.callbacks
        _log_histogram(callbacks, f"{GROUP}layer_errors", values, trainer.state.global_step)


def _log_histogram(
    callbacks: Iterable[TrainerCallback], name: str, values: Sequence[float], step: int
) -> None:
    """Log a histogram to the reporters that have them, as ``train/<name>`` like other figures.

    ``Trainer.log`` passes on single values only.
    """
    for callback in callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            writer.add_histogram(f"train/{name}", torch.tensor(values), step)
        elif type(callback).__name__ == "WandbCallback" and (wandb := sys.modules.get("wandb")):
            figures = {f"train/{name}": wandb.Histogram(values), "train/global_step": step}
            wandb.log(figures)


def log_record(
    trainer: Trainer, record: StageRecord, number: int, first: Mapping[str, Any]
) -> None:
    """Log the record of a finished stage, and the metrics of the first record for comparison.

    The stage's own metrics are logged by ``evaluate``; the trainer prints the record as one line.
    """
    values = {"stage": number, "mb": record.mb, "relative_error": record.relative_error}
    if record.codebook_use is not None:
        values["codebook_use"] = record.codebook_use
    name = first["stage"].split()[0]  # dense or latent
    metrics = plain_metrics(first["metric"])
    with not_printed(trainer):
        _log(trainer, values | {f"{name}_{metric}": v for metric, v in metrics.items()})


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    trainer.log({f"{GROUP}{name}": value for name, value in values.items()})
