"""The teacher of the staged pass: frozen, in eval mode, on a device of its own if need be."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer

from ...distributed import raise_on_all_ranks
from ...modeling.activations import evaluating
from ..arguments import CompressionArguments
from .features import eager_attention, inner_terms, without_attention_dropout
from .logits import logits_divergence


class Teacher:
    """A frozen model, and what a student learns of it.

    Args:
        student: the model that is compressed, before anything is changed.
        given: the model to learn from, frozen and put in eval mode in place; None takes a copy of
            the student.
        args: weights of the terms, temperature and device.

    Attributes:
        model: the frozen model.
        flags: keyword arguments that both forwards need.

    Raises:
        ValueError: if the teacher is the student itself.
    """

    def __init__(
        self, student: nn.Module, given: nn.Module | None, args: CompressionArguments
    ) -> None:
        if given is student:
            raise ValueError(
                "teacher: the model cannot teach itself, for it changes; leave teacher=None (a "
                "frozen copy of it is taken), or give another model"
            )
        self.args = args
        device = args.teacher_device or next(student.parameters()).device
        model = copy.deepcopy(student) if given is None else given
        self.model = model.eval().requires_grad_(False).to(device)
        self.device = next(self.model.parameters()).device
        self.decodes = bool(getattr(student.config, "is_encoder_decoder", False))
        self.terms, self.flags = inner_terms(
            args.distill_hidden, args.distill_attention, args.distill_layers
        )

    @property
    def reads_attention(self) -> bool:
        """Whether attention maps are a target."""
        return "attention" in self.terms

    def inputs_of(self, inputs: Mapping[str, Any], label_names: list[str]) -> dict[str, Any]:
        """A batch without labels, which are for the loss that is left out. Encoder-decoder models
        keep theirs: they make the decoder's inputs of them."""
        given = ("decoder_input_ids" in inputs) or ("decoder_inputs_embeds" in inputs)
        if self.decodes and not given:
            return dict(inputs)
        return {name: value for name, value in inputs.items() if name not in label_names}

    @torch.no_grad()
    def outputs(self, inputs: Mapping[str, Any], label_names: list[str]) -> dict[str, Any]:
        """Return the teacher's outputs for a batch (labels are ignored), on the batch's device."""
        home = next(x.device for x in inputs.values() if isinstance(x, Tensor))
        batch = send_to_device(self.inputs_of(inputs, label_names), self.device)
        outputs = self.model(**batch, **self.flags)
        kept = {name: value for name, value in outputs.items() if isinstance(value, Tensor | tuple)}
        return send_to_device(kept, home)

    def divergences(
        self,
        student: nn.Module,
        outputs: Mapping[str, Any],
        inputs: Mapping[str, Any],
        label_names: list[str],
        taught: Mapping[str, Any] | None = None,
    ) -> dict[str, tuple[float, Tensor]]:
        """Name of each term -> its weight in the loss, and its value.

        Args:
            student: the model that is compressed, not wrapped.
            outputs: of its forward, with :attr:`flags`.
            inputs: the batch, with labels.
            label_names: which of it are labels.
            taught: :meth:`outputs` for the batch, where they are known.
        """
        own = self.outputs(inputs, label_names) if taught is None else taught
        logits = logits_divergence(student, outputs, own, inputs, self.args.temperature)
        terms = {"logits": (self.args.distill_weight, logits)}
        for name, (weight, term) in self.terms.items():
            terms[name] = (weight, term(outputs, own, inputs))
        return terms

    def check(self, trainer: Trainer) -> None:
        """Compares student and teacher on one batch of each rank. On all ranks.

        Args:
            trainer: has the student, still dense, and its data.

        Raises:
            ValueError: naming the field and the way out; on all ranks if on one. A student that is
                its own teacher is refused where it has no logits to learn of.
        """
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with raise_on_all_ranks():  # each rank has examples of its own size
            self._compare(trainer.model, inputs, trainer.label_names)

    @torch.no_grad()
    def _compare(
        self, student: nn.Module, inputs: Mapping[str, Any], label_names: list[str]
    ) -> None:
        with evaluating(student), self.attention_maps(student):
            batch = self.inputs_of(inputs, label_names)
            self.divergences(student, student(**batch, **self.flags), inputs, label_names)

    def attention_maps(self, student: nn.Module):
        """A context in which both models compute their attention maps, if they are a target."""
        return eager_attention(*((student, self.model) if self.reads_attention else ()))

    def prepare(self, student: nn.Module) -> None:
        """Before each forward of the student in training."""
        if self.reads_attention:
            without_attention_dropout(student)
