"""The trainer of one stage: finetunes a partly packed model, with labels, a teacher, or both."""

from __future__ import annotations

import torch
from torch import nn

from ..modeling.packed import PREFIX
from .arguments import CompressionArguments
from .distillation import distillation_loss
from .guards import GuardedTrainer
from .reassign import ReassignCallback


class StageTrainer(GuardedTrainer):
    """Finetunes a partly packed model, with labels, a teacher, or both.

    Args:
        compression_args: weights, temperature and learning rates.
        teacher: the uncompressed model, or None to learn from labels alone.
    """

    def __init__(
        self,
        *args,
        compression_args: CompressionArguments,
        teacher: nn.Module | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.compression_args = compression_args
        self.teacher = teacher
        if (steps := compression_args.reassign_steps) is not None:
            self.add_callback(ReassignCallback(steps, compression_args.reassign_share))
        if teacher is not None:
            # The loss below is a mean over the batch, whatever the head does with its count.
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the run, with a parameter group of their own for the centroids."""
        rate = self.compression_args.codebook_learning_rate
        if self.optimizer is not None or rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        names = {
            id(parameter): name
            for name, parameter in (self.model if model is None else model).named_parameters()
        }
        codebooks = []
        for group in optimizer.param_groups:
            own = [
                parameter
                for parameter in group["params"]
                if names[id(parameter)].rpartition(".")[2].startswith(PREFIX)
            ]
            kept = {id(parameter) for parameter in own}
            group["params"] = [p for p in group["params"] if id(p) not in kept]
            codebooks += own
        optimizer.add_param_group({"params": codebooks, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """(1 - w) * loss of the labels + w * divergence from the teacher."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")
        weight = self.compression_args.distill_weight
        if weight < 1:
            loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        else:
            loss, outputs = 0.0, model(**{k: v for k, v in inputs.items() if k != "labels"})
        with torch.no_grad():
            teacher = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"})
        divergence = distillation_loss(
            outputs["logits"], teacher["logits"], self.compression_args.temperature, labels
        )
        loss = (1 - weight) * loss + weight * divergence
        return (loss, outputs) if return_outputs else loss
