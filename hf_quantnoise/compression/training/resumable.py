"""A trainer whose run is one piece of a longer one: it goes on from another's optimizer and
schedule, and its checkpoints hold the model as it is in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...distributed import full_tensor
from ..checkpoints import (
    MEMORY_NAME,
    flush_to_disk,
    in_memory_tensors,
    load_in_memory_tensors,
    write_tensors,
)
from .fsdp import like_state_of
from .packed_trainer import PackedModelTrainer

# Parameter name -> the optimizer's state of it.
OptimizerState = dict[str, dict[str, Any]]


class _KeepsMemory(TrainerCallback):
    """Adds the last file to a checkpoint; one without it was torn."""

    def __init__(self, trainer: PackedModelTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        """Writes the tensors as they are in memory, once all ranks have written what is theirs."""
        model = self.trainer.up_to_date_model()
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            folder = os.path.join(args.output_dir, name)
            flush_to_disk(folder)
            write_tensors(in_memory_tensors(model), os.path.join(folder, MEMORY_NAME))


class ResumableTrainer(PackedModelTrainer):
    """``PackedModelTrainer`` for a piece of a longer run.

    Args:
        span: the part of one learning-rate schedule that this run has, as shares of the whole;
            (0, 1) is a schedule of its own.
        optimizer_state: of an earlier piece, for the parameters that are still there.
    """

    def __init__(
        self,
        *args,
        span: tuple[float, float] = (0.0, 1.0),
        optimizer_state: OptimizerState | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.span = span
        self._earlier_state = optimizer_state or {}
        self._last_state: OptimizerState = {}
        self.add_callback(_KeepsMemory(self))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the whole run, advanced to where this piece begins. By now the optimizer
        has the parameters that are trained, sharded ones too: they get their earlier state."""
        self._take_up_state()
        start, end = self.span
        if self.lr_scheduler is not None or self.span == (0.0, 1.0):
            return super().create_scheduler(num_training_steps, optimizer)
        whole = round(num_training_steps / (end - start))
        scheduler = super().create_scheduler(whole, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it steps before the optimizer does, on purpose
            for _ in range(round(whole * start)):
                scheduler.step()
        return scheduler

    def _trained_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        own = self.model if self._sharded is None else self._sharded.model
        return own.named_parameters()

    def _take_up_state(self) -> None:
        for name, parameter in self._trained_parameters():
            if name in self._earlier_state and parameter not in self.optimizer.state:
                self.optimizer.state[parameter] = {
                    key: like_state_of(parameter, value)
                    for key, value in self._earlier_state[name].items()
                }
        self._earlier_state = {}

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state by the names of the parameters, after training or in it."""
        if self.optimizer is None:
            return self._last_state
        names = {id(parameter): name for name, parameter in self._trained_parameters()}
        return {
            names[id(parameter)]: {
                key: full_tensor(value) if isinstance(value, torch.Tensor) else value
                for key, value in state.items()
            }
            for parameter, state in self.optimizer.state.items()
            if id(parameter) in names
        }

    def _leave_sharded(self) -> None:
        self._last_state = self.optimizer_state()
        super()._leave_sharded()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, MEMORY_NAME)
        if os.path.isfile(path):
            target = self.model if model is None else model
            load_in_memory_tensors(target, load_file(path))
