"""Calibration data of a compression run: the first training batches of a stage."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch

from ..modeling.activations import calibrate
from ..modeling.packer import ModelPacker, StageResult
from .training.stage_trainer import StageTrainer


def calibration_data(
    trainer: StageTrainer, packer: ModelPacker, n_batches: int
) -> tuple[list, Callable[[object], object]]:
    """Return the first training batches, and a function that runs the model on one of them."""
    batches = list(islice(trainer.get_train_dataloader(), n_batches))
    return batches, lambda batch: trainer.prediction_step(packer.planned, batch, False)


def check_before_stages(trainer: StageTrainer, packer: ModelPacker, n_batches: int) -> None:
    """Raise ValueError if a weight cannot be packed, or inputs to be measured do not exist."""
    packer.check_weights()
    if packer.config.reads_data:
        with torch.random.fork_rng():  # as if no data had been read
            packer.require_runs(*calibration_data(trainer, packer, n_batches))


def calibrate_stage(
    trainer: StageTrainer, packer: ModelPacker, packed: StageResult, n_batches: int
) -> None:
    """Set the scales of the inputs of a stage's layers, on its training data (section 7.7)."""
    layers = [packer.model.get_submodule(name) for name in packed.layers]
    if any(layer.activation_bits is not None for layer in layers):
        calibrate(packer.model, layers, *calibration_data(trainer, packer, n_batches))
