"""Distillation of features: hidden states and attention maps, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ...compat import attention_implementation, set_attention_implementation
from ...modeling.padding import IGNORED, tensor_labels
from .losses import attention_divergence, hidden_state_error

logger = logging.get_logger(__name__)

Layers = str | Sequence[int]
Values = Mapping[str, Any]  # the outputs of a model, or a batch

# Output -> the stack whose positions are its rows (and, for attention maps, its keys).
_HIDDEN_STATES = {
    "hidden_states": "encoder",
    "encoder_hidden_states": "encoder",
    "decoder_hidden_states": "decoder",
}
_ATTENTIONS = {
    "attentions": ("encoder", "encoder"),
    "encoder_attentions": ("encoder", "encoder"),
    "decoder_attentions": ("decoder", "decoder"),
    "cross_attentions": ("decoder", "encoder"),
}


def hidden_state_loss(student: Values, teacher: Values, inputs: Values, layers: Layers) -> Tensor:
    """Mean of :func:`~.losses.hidden_state_error` over matched layers.

    The outputs of both models have ``output_hidden_states=True``; the masks are read from the
    batch. The input of the first layer is skipped. Encoder and decoder contribute one half each.
    """
    masks = _padding_masks(inputs)

    def error(name: str, s: Tensor, t: Tensor) -> Tensor:
        return hidden_state_error(s, t, _flat_mask(masks[_HIDDEN_STATES[name]], s.shape))

    return _mean_over_layers(error, "distill_hidden", student, teacher, layers, first=1)


def attention_loss(student: Values, teacher: Values, inputs: Values, layers: Layers) -> Tensor:
    """Mean of :func:`~.losses.attention_divergence` over matched layers.

    The arguments are those of :func:`hidden_state_loss`, with ``output_attentions=True``. Encoder,
    decoder and cross attention contribute one third each.
    """
    masks, key_masks = _padding_masks(inputs), _padding_masks(inputs, use_labels=False)

    def divergence(name: str, s: Tensor, t: Tensor) -> Tensor:
        stack, key_stack = _ATTENTIONS[name]
        mask = _flat_mask(masks[stack], (s.shape[0], s.shape[2]))
        key_mask = _flat_mask(key_masks[key_stack], (s.shape[0], s.shape[3]))
        return attention_divergence(s, t, mask, key_mask)

    loss = _mean_over_layers(divergence, "distill_attention", student, teacher, layers)
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "distill_attention: the student's attention maps have no gradients, because re-entrant "
            "gradient checkpointing drops them; set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return loss


def _padding_masks(inputs: Values, use_labels: bool = True) -> dict[str, Tensor | None]:
    """Return the mask of each stack, False for padding.

    A decoder without a mask is masked by its labels, which are -100 for padding. Its keys need no
    mask: attention is causal.
    """
    decoder, labels = inputs.get("decoder_attention_mask"), tensor_labels(inputs)
    if decoder is None and use_labels and labels is not None and labels.dim() == 2:
        decoder = labels != IGNORED
    masks = {"encoder": inputs.get("attention_mask"), "decoder": decoder}
    return {name: None if mask is None else mask.bool() for name, mask in masks.items()}


def _flat_mask(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Return a mask of shape (batch, positions); None for images, or if nothing is masked.

    For multiple choice, where the mask has shape (batch, choices, positions), each choice is an
    example.
    """
    if mask is None or len(shape) > 3:
        return None
    flat = mask.reshape(-1, mask.shape[-1])
    if flat.shape != tuple(shape[:2]):
        raise ValueError(
            f"distill_hidden and distill_attention: invalid mask of shape {tuple(mask.shape)}, "
            f"expected (batch, positions) = {tuple(shape[:2])}; set both to 0"
        )
    return flat


def _mean_over_layers(
    loss: Callable[[str, Tensor, Tensor], Tensor],
    field: str,
    student: Values,
    teacher: Values,
    layers: Layers,
    first: int = 0,
) -> Tensor:
    """Return the mean over matched layers of each output, then the mean over outputs."""
    names = _HIDDEN_STATES if field == "distill_hidden" else _ATTENTIONS
    means = []
    for name in names:
        students, teachers = ([x for x in outputs.get(name) or () if x is not None][first:]
                              for outputs in (student, teacher))  # fmt: skip
        if students and teachers:
            pairs = match_layers(len(students), len(teachers), layers)
            losses = [loss(name, students[s], teachers[t]) for s, t in pairs]
            means.append(torch.stack(losses).mean())
    if not means:
        raise ValueError(
            f"{field}: student and teacher have none of {', '.join(names)} in common (the student "
            f"returns {', '.join(student)}, the teacher {', '.join(teacher)}); set {field}=0"
        )
    return torch.stack(means).mean()


def match_layers(student: int, teacher: int, layers: Layers) -> list[tuple[int, int]]:
    """Return pairs of indices of matched layers (student, teacher).

    Layers are matched evenly (TinyBERT): the n-th of S layers with the floor(n T / S)-th of T, so
    the last with the last.

    Args:
        student, teacher: number of layers, S and T.
        layers: the student's layers to use: ``"all"``, ``"last"``, or indices (negative ones from
            the end), as a list or a comma-separated string.
    """
    indices = {"all": list(range(student)), "last": [student - 1]}.get(str(layers))
    if indices is None:
        indices = parse_layers(layers)
    if wrong := [index for index in indices if not -student <= index < student]:
        raise ValueError(
            f"invalid distill_layers={layers!r}: the student has {student} layers, so there is no "
            f"layer {wrong[0]}; use 0 to {student - 1}, 'all' or 'last'"
        )
    indices = [index % student for index in indices]
    return [(index, max(1, (index + 1) * teacher // student) - 1) for index in indices]


def parse_layers(layers: Layers) -> list[int]:
    """Return layer indices from a list or a comma-separated string."""
    parts = layers.split(",") if isinstance(layers, str) else layers
    try:
        indices = [int(part) for part in parts]
    except (TypeError, ValueError):
        indices = []
    if not indices or (not isinstance(layers, str) and indices != list(layers)):
        raise ValueError(
            f"invalid distill_layers={layers!r}: expected 'all', 'last', or layer indices from 0, "
            "e.g. '0,3,5' or [0, 3, 5]"
        )
    return indices


@contextmanager
def eager_attention(*models: nn.Module) -> Iterator[None]:
    """Compute attention with ``"eager"`` in this context, so that models return attention maps.

    Other implementations (``"sdpa"``) do not materialize the maps; transformers then returns none,
    with only a warning.
    """
    saved = [
        (module.config, attention_implementation(module.config))
        for model in models
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    ]
    others = sorted({str(name) for _, name in saved} - {"eager"})
    if others:
        logger.warning_once(
            f"distill_attention needs attention maps: attention uses 'eager' instead of "
            f"{', '.join(map(repr, others))} during the training."
        )
    try:
        for model in models:
            if isinstance(model, PreTrainedModel):
                model.set_attn_implementation("eager")
        yield
    finally:
        for config, name in saved:
            set_attention_implementation(config, name)
