"""The trainer that finetunes a partly packed model in one stage."""

from __future__ import annotations

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from ...callback import QuantNoiseCallback
from ...configuration import QuantNoiseConfig
from ...modeling.packed import PREFIX
from ...noise import find_state
from ..arguments import CompressionArguments
from ..distillation.teacher import Teacher
from ..exact_checkpoints import ExactCheckpoints
from .distilling_trainer import DistillingTrainer

# What Trainer computes of the steps since it was started.
_OF_LATER_STEPS = {"train_loss", "train_runtime"} | {
    f"train_{unit}_per_second" for unit in ("samples", "steps", "tokens")
}


class _StageCheckpoints(ExactCheckpoints):
    """A checkpoint without the tensors in memory is incomplete."""

    trainer: StageTrainer

    def gather_model(self) -> nn.Module:
        return self.trainer.gather_model()


class StageTrainer(DistillingTrainer):
    """Finetunes a partly packed model with labels, a teacher, or both.

    Its checkpoints also hold the model as it is in memory, so that it resumes bit for bit.

    Args:
        compression_args: weights of the loss terms and the learning rate of the centroids.
        teacher: None trains with labels only.
        noise: noise on layers that are still dense.
        args, kwargs: those of ``Trainer``, without ``callbacks``.
    """

    def __init__(
        self,
        *args,
        compression_args: CompressionArguments,
        teacher: Teacher | None = None,
        noise: QuantNoiseConfig | None = None,
        **kwargs,
    ) -> None:
        # The noise callback comes first: the last file of a checkpoint must be written after it.
        callbacks = [] if noise is None else [QuantNoiseCallback(noise)]
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self.add_callback(_StageCheckpoints(self))
        self.compression_args = compression_args
        self.set_teacher(teacher)
        self._resumed = False

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs
    ) -> TrainOutput:
        """``Trainer.train``; a resumed one has no loss and speed, which are of later steps."""
        self._resumed = bool(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        return result._replace(metrics=self._of_all_steps(result.metrics))

    def _of_all_steps(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics that are not of the steps since the training was resumed only."""
        if not self._resumed:
            return metrics
        return {name: value for name, value in metrics.items() if name not in _OF_LATER_STEPS}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; centroids with another learning rate get a parameter group."""
        rate = self.compression_args.codebook_learning_rate
        if self.optimizer is not None or rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        packed = {
            id(parameter)
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[2].startswith(PREFIX)
        }
        codebooks = []
        for group in optimizer.param_groups:
            codebooks += [p for p in group["params"] if id(p) in packed]
            group["params"] = [p for p in group["params"] if id(p) not in packed]
        optimizer.add_param_group({"params": codebooks, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each distillation term since the last log and the noise rates."""
        logs = self._of_all_steps(dict(logs))
        if "loss" in logs and (state := find_state(self.model)) is not None:
            logs |= state.rates()
        super().log(logs, start_time)
