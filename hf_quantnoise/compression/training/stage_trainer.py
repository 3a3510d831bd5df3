"""The trainer that finetunes a partly packed model in one stage."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from ...callback import QuantNoiseCallback
from ...configuration import QuantNoiseConfig
from ...modeling.packed import PREFIX
from ...noise import find_state
from ..arguments import CompressionArguments
from ..checkpoints import MemoryCheckpoint
from ..distillation.teacher import Teacher
from .packed_trainer import PackedModelTrainer


class StageTrainer(PackedModelTrainer):
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
        self.add_callback(MemoryCheckpoint(self))
        self.compression_args = compression_args
        self.teacher = teacher
        self._term_sums: dict[str, torch.Tensor] = {}
        self._batches = 0
        if teacher is not None:
            # The loss below is a mean over the batch, so Trainer divides it by the accumulation
            # steps.
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False

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

    def train(self, *args, **kwargs):
        """``Trainer.train``; computes attention maps if they are distilled."""
        maps = nullcontext() if self.teacher is None else self.teacher.attention_maps(self.model)
        with maps:
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of the labels combined with the distillation terms.

        (1 - w) * labels + w * logits + v * hidden states + u * attention maps, with w, v and u from
        the arguments; in eval mode the loss of the labels alone.
        """
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.teacher.prepare(self.model)
        weight, kwargs = self.compression_args.distill_weight, self.teacher.forward_kwargs
        if weight < 1:
            loss, outputs = super().compute_loss(model, {**inputs, **kwargs}, return_outputs=True)
        else:
            without_labels = self.teacher.model_inputs(inputs, self.label_names)
            loss, outputs = 0.0, model(**without_labels, **kwargs)
        terms = self.teacher.loss_terms(self.unsharded_model, outputs, inputs, self.label_names)
        loss = (1 - weight) * loss
        for name, (term_weight, value) in terms.items():
            loss = loss + term_weight * value
            self._term_sums[name] = self._term_sums.get(name, 0.0) + value.detach()
        self._batches += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each distillation term since the last log and the noise rates."""
        logs = dict(logs)
        if "loss" in logs and (state := find_state(self.model)) is not None:
            logs |= state.rates()
        if "loss" in logs and self._batches:
            for name, total in self._term_sums.items():
                mean = self.accelerator.gather(total / self._batches).mean()
                logs[f"teacher_{name}"] = mean.item()
            self._term_sums, self._batches = {}, 0
        super().log(logs, start_time)
