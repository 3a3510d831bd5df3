"""The trainer of one stage: finetunes a partly packed model, with labels, a teacher, or both."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from ...callback import QuantNoiseCallback
from ...configuration import QuantNoiseConfig
from ...modeling.packed import PREFIX
from ...noise import find_state
from ..arguments import CompressionArguments
from ..distillation.teacher import Teacher
from .resumable import ResumableTrainer


class StageTrainer(ResumableTrainer):
    """Finetunes a partly packed model, with labels, a teacher, or both.

    Args:
        compression_args: weights, temperature and learning rates.
        teacher: what is learnt of the uncompressed model, or None to learn from labels alone.
        noise: that of the layers which are still dense, or None.
        kwargs: what :class:`ResumableTrainer` and ``Trainer`` take.
    """

    def __init__(
        self,
        *args,
        compression_args: CompressionArguments,
        teacher: Teacher | None = None,
        noise: QuantNoiseConfig | None = None,
        **kwargs,
    ) -> None:
        # First, so that the noise is in a checkpoint before its last file makes it count.
        callbacks = [] if noise is None else [QuantNoiseCallback(noise)]
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self.compression_args = compression_args
        self.teacher = teacher
        self._sums: dict[str, torch.Tensor] = {}
        self._batches = 0
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

    def train(self, *args, **kwargs):
        """As ``Trainer`` does, with attention maps where the teacher's are a target."""
        maps = nullcontext() if self.teacher is None else self.teacher.attention_maps(self.model)
        with maps:
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """(1 - w) * loss of the labels + w * divergence of the logits + v * that of hidden states +
        u * that of attention maps, with the weights w, v and u of the arguments; in eval mode the
        loss of the labels alone."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.teacher.prepare(self.model)
        weight, flags = self.compression_args.distill_weight, self.teacher.flags
        if weight < 1:
            loss, outputs = super().compute_loss(model, {**inputs, **flags}, return_outputs=True)
        else:
            loss, outputs = 0.0, model(**self.teacher.inputs_of(inputs, self.label_names), **flags)
        terms = self.teacher.divergences(self.plain_model, outputs, inputs, self.label_names)
        loss = (1 - weight) * loss
        for name, (share, value) in terms.items():
            loss = loss + share * value
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._batches += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the teacher's terms, each the mean since the last log, the use of its cache, the
        rates of the noise that is kept."""
        logs = dict(logs)
        if "loss" in logs and (state := find_state(self.model)) is not None:
            logs |= state.rates()
        if "loss" in logs and self._batches:
            for name, total in self._sums.items():
                mean = self.accelerator.gather(total / self._batches).mean()
                logs[f"teacher_{name}"] = mean.item()
            self._sums, self._batches = {}, 0
        super().log(logs, start_time)
