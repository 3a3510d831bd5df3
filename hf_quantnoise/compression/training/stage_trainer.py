"""The trainer of one stage: finetunes a partly packed model, with labels, a teacher, or both."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...callback import QuantNoiseCallback
from ...configuration import QuantNoiseConfig
from ...modeling.activations import evaluating
from ...modeling.packed import PREFIX
from ...noise import find_state
from ..arguments import CompressionArguments
from ..distillation.teacher import Teacher
from ..reassign import ReassignCallback
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
        self._reassign: ReassignCallback | None = None
        if (steps := compression_args.reassign_steps) is not None:
            self._reassign = ReassignCallback(steps, compression_args.reassign_share)
            self.add_callback(self._reassign)
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
        try:
            with maps:
                return super().train(*args, **kwargs)
        finally:
            if self._reassign is not None:
                self._reassign.forget()

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """A micro-batch; the first after a window of gradients decides, before it is learnt from,
        on the exchanges that the window proposes (``reassign.py``)."""
        if self._reassign is not None and self._reassign.waits:
            self._check_exchanges(inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def _check_exchanges(self, inputs, num_items_in_batch) -> None:
        model, inputs, taught = self.plain_model, self._prepare_inputs(inputs), None

        def loss() -> Tensor:
            with _random_numbers_put_back(self.args.device), self.compute_loss_context_manager():
                return self._objective(model, dict(inputs), num_items_in_batch, taught)[0]

        with evaluating(model), torch.no_grad():
            if self.teacher is not None:
                with _random_numbers_put_back(self.args.device):
                    taught = self.teacher.outputs(inputs, self.label_names)
            self._reassign.check(self.state.global_step, loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """(1 - w) * loss of the labels + w * divergence of the logits + v * that of hidden states +
        u * that of attention maps, with the weights w, v and u of the arguments; in eval mode the
        loss of the labels alone."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs, terms = self._objective(model, inputs, num_items_in_batch)
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._batches += 1
        return (loss, outputs) if return_outputs else loss

    def _objective(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
        taught: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """What is trained, whatever mode the model is in.

        Args:
            taught: what the teacher says to the batch, where it is known.

        Returns:
            (loss, outputs of the model, the teacher's terms without their weights).
        """
        if self.teacher is None:
            return *super().compute_loss(model, inputs, True, num_items_in_batch), {}
        self.teacher.prepare(self.model)
        weight, flags = self.compression_args.distill_weight, self.teacher.flags
        if weight < 1:
            loss, outputs = super().compute_loss(model, {**inputs, **flags}, return_outputs=True)
        else:
            loss, outputs = 0.0, model(**self.teacher.inputs_of(inputs, self.label_names), **flags)
        terms = self.teacher.divergences(
            self.plain_model, outputs, inputs, self.label_names, taught
        )
        loss = (1 - weight) * loss
        for share, value in terms.values():
            loss = loss + share * value
        return loss, outputs, {name: value for name, (_, value) in terms.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the teacher's terms, each the mean since the last log, the rates of the
        noise that is kept, and how many blocks have changed their codewords."""
        logs = dict(logs)
        if self._reassign is not None and logs.keys() & {"loss", "train_runtime"}:
            logs |= self._reassign.figures()
        if "loss" in logs and (state := find_state(self.model)) is not None:
            logs |= state.rates()
        if "loss" in logs and self._batches:
            for name, total in self._sums.items():
                mean = self.accelerator.gather(total / self._batches).mean()
                logs[f"teacher_{name}"] = mean.item()
            self._sums, self._batches = {}, 0
        super().log(logs, start_time)


@contextmanager
def _random_numbers_put_back(device: torch.device) -> Iterator[None]:
    """What is drawn inside is drawn again afterwards."""
    kept = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
