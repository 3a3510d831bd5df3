"""Targets inside the models: hidden states and attention maps, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ...modeling.padding import IGNORED
from .losses import attention_divergence, hidden_state_error, matched_layers

logger = logging.get_logger(__name__)

# Output -> whose positions it has ("" encoder or only stack, "decoder"): rows, and keys.
_HIDDEN_STATES = {"hidden_states": "", "encoder_hidden_states": "", "decoder_hidden_states": "d"}
_ATTENTIONS = {
    "attentions": ("", ""),
    "encoder_attentions": ("", ""),
    "decoder_attentions": ("d", "d"),
    "cross_attentions": ("d", ""),
}


def hidden_state_term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    inputs: Mapping[str, Any],
    layers: str | Sequence[int],
) -> Tensor:
    """The mean over matched layers of :func:`~.distillation.hidden_state_error`.

    What enters the first layer is left out: it is the output of no layer. Of encoder-decoder
    models both stacks count, as two halves.

    Args:
        student, teacher: outputs of both, with ``output_hidden_states=True``.
        inputs: the batch, for its masks.
        layers: see :func:`~.distillation.matched_layers`.

    Raises:
        ValueError: if there are none, or their widths differ.
    """
    rows = _masks(inputs)
    terms = []
    for name, stack in _HIDDEN_STATES.items():
        pairs = _pairs(name, student, teacher, layers, first=1)
        errors = [hidden_state_error(s, t, _of_positions(rows[stack], s.shape)) for s, t in pairs]
        terms += [torch.stack(errors).mean()] if errors else []
    return _mean_of(terms, "distill_hidden", "hidden states", student, teacher)


def attention_term(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    inputs: Mapping[str, Any],
    layers: str | Sequence[int],
) -> Tensor:
    """The mean over matched layers of :func:`~.distillation.attention_divergence`.

    Arguments as of :func:`hidden_state_term`, with ``output_attentions=True``; of encoder-decoder
    models encoder, decoder and cross attention count, as three thirds.

    Raises:
        ValueError: if there are no maps, they carry no gradients, or numbers of heads differ.
    """
    rows, keys = _masks(inputs), _masks(inputs, by_labels=False)
    terms = []
    for name, (stack, source) in _ATTENTIONS.items():
        pairs = _pairs(name, student, teacher, layers)
        errors = [
            attention_divergence(
                s,
                t,
                _of_positions(rows[stack], (s.shape[0], s.shape[2])),
                _of_positions(keys[source], (s.shape[0], s.shape[3])),
            )
            for s, t in pairs
        ]
        terms += [torch.stack(errors).mean()] if errors else []
    term = _mean_of(terms, "distill_attention", "attention maps", student, teacher)
    if torch.is_grad_enabled() and not term.requires_grad:
        raise ValueError(
            "distill_attention: the student's attention maps carry no gradients; re-entrant "
            "gradient checkpointing hides them: set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return term


def _masks(inputs: Mapping[str, Any], by_labels: bool = True) -> dict[str, Tensor | None]:
    """Boolean masks of what is no padding, of both stacks. A decoder without a mask of its own has
    its labels: those of padding are -100; its causal rows never read it as keys."""
    decoder, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    if decoder is None and by_labels and labels is not None and labels.dim() == 2:
        decoder = labels != IGNORED
    encoder = inputs.get("attention_mask")
    return {name: None if m is None else m.bool() for name, m in (("", encoder), ("d", decoder))}


def _of_positions(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """A mask in the shape (batch, positions) of what it masks; several choices of an example are
    examples of their own there. None for images, and where nothing is masked."""
    if mask is None or len(shape) > 3:
        return None
    flat = mask.reshape(-1, mask.shape[-1])
    if flat.shape != tuple(shape[:2]):
        raise ValueError(
            f"distill_hidden and distill_attention read masks of shape (batch, positions); this "
            f"one is {tuple(mask.shape)} and the positions are {tuple(shape[:2])}; set both to 0"
        )
    return flat


def _pairs(
    name: str,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    layers: str | Sequence[int],
    first: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Outputs of matched layers; none where either model has none of that name."""
    own, other = ([x for x in outputs.get(name) or () if x is not None][first:]
                  for outputs in (student, teacher))  # fmt: skip
    if not own or not other:
        return []
    return [(own[s], other[t]) for s, t in matched_layers(len(own), len(other), layers)]


def _mean_of(
    terms: list[Tensor],
    field: str,
    what: str,
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
) -> Tensor:
    if not terms:
        raise ValueError(
            f"{field}: student and teacher have no {what} in common; the student gives "
            f"{', '.join(student)}, the teacher {', '.join(teacher)}; set {field}=0"
        )
    return torch.stack(terms).mean()


# ---- what attention maps need of a model ---------------------------------------------------------


@contextmanager
def eager_attention(*models: nn.Module) -> Iterator[None]:
    """Lets models compute their attention maps, and puts them back as they were afterwards.

    Other implementations (``"sdpa"``) never hold the maps: transformers then returns none, with no
    more than a warning.
    """
    saved = [
        (module.config, module.config._attn_implementation)
        for model in models
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    ]
    others = sorted({str(name) for _, name in saved} - {"eager"})
    if others:
        logger.warning_once(
            f"distill_attention needs attention maps: attention is computed by 'eager' instead of "
            f"{', '.join(map(repr, others))} while a stage is finetuned."
        )
    try:
        for model in models:
            if isinstance(model, PreTrainedModel):
                model.set_attn_implementation("eager")
        yield
    finally:
        for config, name in saved:
            config._attn_implementation = name


def without_attention_dropout(model: nn.Module) -> None:
    """Puts attention modules in eval mode, until the next ``model.train()``: in training the maps
    that a model returns have gone through dropout, and a dropped probability of 0 would count as
    one that is wrong by any factor."""
    for module in model.modules():
        if "attention" in type(module).__name__.lower():
            module.eval()


Term = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], Tensor]


def inner_terms(
    distill_hidden: float, distill_attention: float, layers: str | Sequence[int]
) -> tuple[dict[str, tuple[float, Term]], dict[str, bool]]:
    """The terms of a weight above 0, and what a forward must be asked for to give them.

    Returns:
        Name of each term -> its weight and function; keyword arguments of the forward.
    """
    known = {
        "hidden": (distill_hidden, hidden_state_term, "output_hidden_states"),
        "attention": (distill_attention, attention_term, "output_attentions"),
    }
    asked = {name: each for name, each in known.items() if each[0] > 0}
    terms = {name: (weight, partial(term, layers=layers))
             for name, (weight, term, _) in asked.items()}  # fmt: skip
    return terms, {flag: True for _, _, flag in asked.values()}
