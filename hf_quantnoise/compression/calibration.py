"""Calibration data of a compression run: the first training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import Trainer, set_seed

from ..batch_norm import tracking_norms, warn_without_data
from ..compat import prepare_inputs
from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from ..lookups import Lookups
from ..modeling.activations import calibrate
from ..modeling.packer import ModelPacker, StageResult
from ..training_statistics import TrainingStatistics
from .arguments import CompressionArguments
from .fitted_noise import lookups_for
from .reporting.console import shows_progress
from .training.stage_trainer import StageTrainer


def training_batches(trainer: Trainer, n_batches: int) -> Iterator[Mapping[str, Any]]:
    """Yield the first training batches; the data loader is created for the first one."""
    if trainer.train_dataset is not None:
        for batch in islice(trainer.get_train_dataloader(), n_batches):
            yield prepare_inputs(trainer, batch)


def lookups_in_training(
    trainer: Trainer,
    model: nn.Module,
    config: QuantizedModelConfig | QuantNoiseConfig,
    args: CompressionArguments,
) -> Lookups:
    """Return :func:`lookups_for` the training batches, the same in a resumed run."""
    with torch.random.fork_rng():  # as if no data had been read
        torch.manual_seed(trainer.args.seed)
        batches = training_batches(trainer, args.lookup_batches)
        return lookups_for(model, config, batches, shows_progress(trainer))


def calibration_data(
    trainer: StageTrainer, packer: ModelPacker, n_batches: int
) -> tuple[list, Callable[[object], object]]:
    """Return the first training batches, and a function that runs the model on one of them."""
    batches = list(islice(trainer.get_train_dataloader(), n_batches))
    return batches, lambda batch: trainer.prediction_step(packer.planned, batch, False)


def importance_data(trainer: StageTrainer, packer: ModelPacker, n_batches: int) -> tuple:
    """Return the batches on which a stage weighs its errors, and the function; or nothing."""
    if not packer.config.weighs_errors:
        return ()
    set_seed(trainer.args.seed)  # a resumed run has to draw the same batches
    return calibration_data(trainer, packer, n_batches)


def check_before_stages(trainer: StageTrainer, packer: ModelPacker, n_batches: int) -> None:
    """Raise ValueError if a weight cannot be packed, or inputs to be measured do not exist."""
    packer.check_weights()
    if trainer.train_dataset is None:
        warn_without_data(packer.model, "the trainer has no train_dataset; pass one")
    if packer.config.reads_inputs:
        with torch.random.fork_rng():  # as if no data had been read
            packer.require_runs(*calibration_data(trainer, packer, n_batches))


def calibrate_stage(
    trainer: StageTrainer, packer: ModelPacker, packed: StageResult, n_batches: int
) -> None:
    """Set the scales of the inputs of a stage's layers, on its training data (section 7.7)."""
    layers = [packer.model.get_submodule(name) for name in packed.layers]
    if any(layer.activation_bits is not None for layer in layers):
        calibrate(packer.model, layers, *calibration_data(trainer, packer, n_batches))


def training_statistics(trainer: StageTrainer, n_batches: int) -> TrainingStatistics:
    """Return what measures the statistics of BatchNorm on the training data of a trainer."""
    model, loader = trainer.model, None
    if trainer.train_dataset is None or not tracking_norms(model):
        n_batches = 0
    if n_batches:
        loader = trainer.get_train_dataloader()

    def forward(batch: object) -> object:
        return trainer.prediction_step(model, batch, False)

    return TrainingStatistics(trainer.args, model, loader, n_batches, forward)
