"""A trainer whose run is one piece of a longer one: it goes on from another's optimizer and
schedule, and its checkpoints hold the model as it is in memory."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .guards import GuardedTrainer
from .pass_files import MEMORY_NAME, put_into_memory, tensors_in_memory, write_tensors

# Parameter name -> the optimizer's state of it.
OptimizerState = dict[str, dict[str, Any]]


class _KeepsMemory(TrainerCallback):
    """Adds the last file to a checkpoint; one without it was torn."""

    def on_save(self, args, state, control, model=None, **kwargs):
        """Writes the tensors as they are in memory."""
        if state.is_world_process_zero:
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            path = os.path.join(args.output_dir, name, MEMORY_NAME)
            write_tensors(tensors_in_memory(model), path)


class ResumableTrainer(GuardedTrainer):
    """``GuardedTrainer`` for a piece of a longer run.

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
        self.add_callback(_KeepsMemory())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, with the state an earlier piece left for the parameters that stay."""
        optimizer = super().create_optimizer(model)
        target = self.model if model is None else model
        for name, parameter in target.named_parameters():
            if name in self._earlier_state and parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    key: value.clone() if isinstance(value, torch.Tensor) else value
                    for key, value in self._earlier_state[name].items()
                }
        self._earlier_state = {}
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the whole run, advanced to where this piece begins."""
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

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state by the names of the parameters."""
        if self.optimizer is None:
            return {}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            names[id(parameter)]: dict(state)
            for parameter, state in self.optimizer.state.items()
            if id(parameter) in names
        }

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, MEMORY_NAME)
        if os.path.isfile(path):
            put_into_memory(self.model if model is None else model, load_file(path))
