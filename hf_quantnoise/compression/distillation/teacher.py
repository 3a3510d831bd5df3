"""The teacher of a run: a model in eval mode, without gradients, on its own device if requested."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer

from ...argument_checks import require_model, require_weights, run_batch
from ...compat import prepare_inputs
from ...distributed import raise_on_all_ranks
from ...module_modes import evaluating
from ..arguments import CompressionArguments
from .features import attention_loss, eager_attention, hidden_state_loss
from .logits import logits_divergence
from .random_tokens import with_random_tokens


def _changes_with(student: nn.Module, teacher: nn.Module) -> bool:
    """Return whether training the student changes the teacher.

    PEFT adds its adapters to the layers of the model that it wraps, which is then no longer the
    model from before.
    """
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    return teacher is student or any(id(each) in trained for each in teacher.parameters())


def _has_in_name(module: nn.Module, word: str) -> bool:
    return word in type(module).__name__.lower()


def require_teacher(teacher: nn.Module | None) -> None:
    """Raise unless a teacher is None, or a module (TypeError) with weights (ValueError)."""
    if teacher is not None:
        require_model(teacher, nn.Module, "teacher")
        require_weights(teacher, "teacher")


def require_distillation(args: CompressionArguments, teacher: nn.Module | None) -> None:
    """Raise a ``ValueError`` if there is a teacher that would not be used."""
    if teacher is not None and not args.distill:
        raise ValueError(
            "compression_args has distill=False, and a teacher is given; remove one of them"
        )


class Teacher:
    """A model that is not trained, and the distillation losses of a student.

    Args:
        student: the model that is compressed, before any change.
        teacher: the model to distill from, put in eval mode and moved in place. Its parameters keep
            ``requires_grad``, so that a copy of it can be trained. None uses a copy of the student.
        args: weights of the losses, temperature and device.

    Attributes:
        model: the model to distill from.
        forward_kwargs: keyword arguments that the forwards of both models need.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, args: CompressionArguments
    ) -> None:
        if teacher is not None and _changes_with(student, teacher):
            raise ValueError(
                "invalid teacher: got the model that is trained, or one that shares trained "
                "parameters with it, expected a separate one; pass copy.deepcopy(model), made "
                "before adapters are added"
            )
        self.args = args
        device = args.teacher_device or next(student.parameters()).device
        model = copy.deepcopy(student) if teacher is None else teacher
        self.model = model.eval().to(device)
        self.device = next(self.model.parameters()).device
        self.is_encoder_decoder = bool(getattr(student.config, "is_encoder_decoder", False))
        self.forward_kwargs = {}
        if args.distill_hidden > 0:
            self.forward_kwargs["output_hidden_states"] = True
        if args.distill_attention > 0:
            self.forward_kwargs["output_attentions"] = True

    def training_inputs(self, inputs: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Return the batch that both models see in training, with random tokens if there are any.

        The errors are those of :func:`with_random_tokens`.
        """
        share = self.args.random_tokens
        return with_random_tokens(inputs, tokenizer, share) if share > 0 else inputs

    def model_inputs(self, inputs: Mapping[str, Any], label_names: list[str]) -> dict[str, Any]:
        """Return a batch without labels, so that the forward computes no loss.

        Encoder-decoder models keep them if they create the decoder's inputs from them.
        """
        has_decoder_inputs = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
        if self.is_encoder_decoder and not has_decoder_inputs:
            return dict(inputs)
        return {name: value for name, value in inputs.items() if name not in label_names}

    @torch.no_grad()
    def outputs(self, inputs: Mapping[str, Any], label_names: list[str]) -> dict[str, Any]:
        """Return the teacher's outputs for a batch (labels are ignored), on the batch's device.

        Images and sounds are converted to the dtype of the teacher, which has no autocast.
        """
        device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
        batch = send_to_device(self.model_inputs(inputs, label_names), self.device)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                batch[name] = value.to(dtype or value.dtype)
        outputs = run_batch(
            self.model,
            {**batch, **self.forward_kwargs},
            "teacher",
            "pass a model that takes the same inputs as the student",
        )
        tensors = {n: value for n, value in outputs.items() if isinstance(value, Tensor | tuple)}
        return send_to_device(tensors, device)

    def loss_terms(
        self,
        student: nn.Module,
        outputs: Mapping[str, Any],
        inputs: Mapping[str, Any],
        label_names: list[str],
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the distillation losses: name -> its weight and value.

        ``student`` is the unwrapped model, ``outputs`` its outputs with :attr:`forward_kwargs`,
        ``inputs`` the batch, with labels.
        """
        args, targets = self.args, self.outputs(inputs, label_names)
        logits = logits_divergence(student, outputs, targets, inputs, args.temperature)
        terms = {"logits": (args.distill_weight, logits)}
        if args.distill_hidden > 0:
            loss = hidden_state_loss(outputs, targets, inputs, args.distill_layers)
            terms["hidden"] = (args.distill_hidden, loss)
        if args.distill_attention > 0:
            loss = attention_loss(outputs, targets, inputs, args.distill_layers)
            terms["attention"] = (args.distill_attention, loss)
        return terms

    def check(self, trainer: Trainer) -> None:
        """Check that student and teacher can be compared, on one batch of each rank.

        Call on all ranks; if one raises, all do. ``trainer`` has the student, still dense.
        """
        batch = next(iter(trainer.get_train_dataloader()))
        student, label_names = trainer.model, trainer.label_names
        inputs = self.training_inputs(prepare_inputs(trainer, batch), trainer.processing_class)
        # Before training, the trainer may have left the model on the CPU.
        inputs = send_to_device(inputs, next(student.parameters()).device)
        batch = self.model_inputs(inputs, label_names)
        # The shapes of examples may differ between ranks.
        maps = self.attention_maps(student)
        with raise_on_all_ranks(), torch.no_grad(), evaluating(student), maps:
            with trainer.accelerator.autocast():
                outputs = student(**batch, **self.forward_kwargs)
            self.loss_terms(student, outputs, inputs, label_names)

    def attention_maps(self, student: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which both models return attention maps, if they are distilled."""
        distilled = self.args.distill_attention > 0
        return eager_attention(student, self.model) if distilled else nullcontext()

    def prepare(self, student: nn.Module) -> None:
        """Prepare the student for a forward in training: no dropout of distilled attention maps.

        A probability that was dropped to 0 would have an unbounded divergence. The other layers of
        an attention block stay in training mode, in which they have noise.
        """
        if self.args.distill_attention > 0:
            for module in student.modules():
                if _has_in_name(module, "attention"):
                    module.training = False  # until the next model.train()
                    for dropout in module.modules():
                        dropout.training &= not _has_in_name(dropout, "dropout")
