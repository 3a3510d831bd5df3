"""A trainer whose loss includes the distillation terms of a teacher (section 3.2)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ...argument_checks import require_instance
from ...compat import count_labels
from ..arguments import CompressionArguments
from ..distillation.teacher import Teacher, require_distillation, require_teacher
from .fsdp import share_what_rank_0_read
from .packed_trainer import PackedModelTrainer


def make_teacher(
    trainer: PackedModelTrainer, teacher: nn.Module | None, args: CompressionArguments
) -> Teacher | None:
    """Return the teacher of a trainer whose model learns from another one, or None without one.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the arguments distill nothing, or the teacher has no weights.
    """
    require_instance(
        "compression_args", args, CompressionArguments, "CompressionArguments",
        "pass e.g. CompressionArguments(distill_weight=1.0)",
    )  # fmt: skip
    if teacher is None:
        return None
    require_teacher(teacher)
    require_distillation(args, teacher)
    share_what_rank_0_read(trainer, teacher)
    return Teacher(trainer.model, teacher, args)


class DistillingTrainer(PackedModelTrainer):
    """``Trainer`` with labels, a teacher, or both.

    Attributes:
        compression_args: weights of the loss terms.
        teacher: None trains with labels only.
    """

    compression_args: CompressionArguments
    teacher: Teacher | None = None

    def set_teacher(self, teacher: Teacher | None) -> None:
        """Distill from a teacher from now on."""
        self.teacher = teacher
        self._term_sums: dict[str, torch.Tensor] = {}
        self._batches = 0
        if teacher is not None:
            # The loss below is a mean over the batch, so Trainer divides it by the accumulation
            # steps.
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False

    def train(self, *args, **kwargs):
        """``Trainer.train``; computes attention maps if they are distilled."""
        if self.teacher is None:
            return super().train(*args, **kwargs)
        with ExitStack() as self._attention_maps:
            if self.model_init is None:  # otherwise Trainer replaces the model
                self._attention_maps.enter_context(self.teacher.attention_maps(self.model))
            return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """``Trainer.call_model_init``; the new model computes attention maps, too."""
        model = super().call_model_init(trial)
        if self.teacher is not None:
            self._attention_maps.enter_context(self.teacher.attention_maps(model))
        return model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of the labels combined with the distillation terms.

        (1 - w) * labels + w * logits + v * hidden states + u * attention maps, with w, v and u from
        the arguments; in eval mode the loss of the labels alone.
        """
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.teacher.prepare(self.model)
        inputs = self.teacher.training_inputs(inputs, self.processing_class)
        weight, kwargs = self.compression_args.distill_weight, self.teacher.forward_kwargs
        if weight < 1:
            loss, outputs = self._label_loss(model, {**inputs, **kwargs})
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

    def _label_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Return the loss of the labels of a micro-batch, a mean over them, and the outputs.

        A ``compute_loss_func`` is passed the number of labels of this micro-batch and process.
        """
        averaged = self.args.average_tokens_across_devices
        # Otherwise the labels of all processes are counted, and the loss is multiplied by their
        # number, which is wrong for functions that return a mean.
        self.args.average_tokens_across_devices = False
        try:
            count = count_labels(self, inputs)
            result: Any = super().compute_loss(model, inputs, True, count)
            return result
        finally:
            self.args.average_tokens_across_devices = averaged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each distillation term since the last log."""
        logs = dict(logs)
        if "loss" in logs and self.teacher is not None and self._batches:
            for name, total in self._term_sums.items():
                mean = self.accelerator.gather(total / self._batches).mean()
                logs[f"teacher_{name}"] = mean.item()
            self._term_sums, self._batches = {}, 0
        super().log(logs, start_time)
