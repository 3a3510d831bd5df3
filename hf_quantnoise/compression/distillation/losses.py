"""Distillation losses (section 3.2): divergences between the outputs of student and teacher.

All of them are means computed in float32, whatever the precision of the models. ``mask`` selects
the positions that count; if it selects none, the loss is 0. Different shapes raise a ValueError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.mean(values)
    values = values[mask]
    return torch.mean(values) if values.numel() else values.sum()


def _same_shape(student: Tensor, teacher: Tensor, what: str, way_out: str) -> tuple[Tensor, Tensor]:
    """Return both in float32, if they have the same shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what} have shape {tuple(teacher.shape)} in the teacher and {tuple(student.shape)} "
            f"in the student, expected the same shape; {way_out}"
        )
    return student.float(), teacher.float()


def _logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return _same_shape(
        student, teacher, "logits", "use a teacher with the student's head and labels"
    )


def softmax_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """KL(softmax(t / T) || softmax(s / T)) * T^2, for mutually exclusive classes.

    Args:
        student, teacher: logits s and t of shape (..., classes).
        temperature: T.
        mask: boolean, of shape (...).
    """
    student, teacher = _logits(student, teacher)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return _masked_mean(divergence, mask) * temperature**2


def sigmoid_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Binary KL divergence * T^2, for independent labels; the mean over labels too.

    With p = sigmoid(t / T) and q = sigmoid(s / T) it is p log(p / q) + (1 - p) log((1 - p) /
    (1 - q)). Arguments are those of :func:`softmax_divergence`.
    """
    student, teacher = _logits(student, teacher)
    student, teacher = student / temperature, teacher / temperature
    p = torch.sigmoid(teacher)
    positive = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
    negative = (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return _masked_mean(positive + negative, mask) * temperature**2


def squared_error(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """(s - t)^2, for regression; the temperature is not used."""
    student, teacher = _logits(student, teacher)
    return _masked_mean(F.mse_loss(student, teacher, reduction="none"), mask)


def hidden_state_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """||s - t||^2 / ||t||^2 of the outputs of a layer, averaged over positions.

    The relative error is independent of width and scale, and a position with huge values
    (attention sinks) does not dominate the others.

    Args:
        student, teacher: shape (batch, positions, width); or (batch, channels, height, width) for
            convolutions. There each image is one position, since single pixels of a feature map
            are often all zero.
        mask: boolean, of shape (batch, positions).
    """
    student, teacher = _same_shape(
        student, teacher, "distill_hidden: hidden states",
        "use a teacher of the same width, or set distill_hidden=0 (distill_attention does not "
        "depend on the width)",
    )  # fmt: skip
    if student.dim() > 3:
        student, teacher = student.flatten(1), teacher.flatten(1)
    error = (student - teacher).square().sum(-1)
    return _masked_mean(error / teacher.square().sum(-1).clamp_min(_TINY), mask)


def attention_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """KL(a_t || a_s) of the attention maps of a layer, averaged over heads and positions (MiniLM).

    Args:
        student, teacher: probabilities, of shape (batch, heads, positions, keys).
        mask: boolean, of shape (batch, positions).
        key_mask: boolean, of shape (batch, keys); False for padding. Rows are normalized over the
            other keys again, because half-precision rows do not add up to one.
    """
    student, teacher = _same_shape(
        student, teacher, "distill_attention: attention maps (batch, heads, positions, keys)",
        "use a teacher with as many heads, or set distill_attention=0",
    )  # fmt: skip
    maps = []
    for attention in (student, teacher):
        if key_mask is not None:
            attention = attention * key_mask[:, None, None, :]
        maps.append(attention / attention.sum(-1, keepdim=True).clamp_min(_TINY))
    student, teacher = maps
    ratio = teacher.clamp_min(_TINY).log() - student.clamp_min(_TINY).log()
    return _masked_mean((teacher * ratio).sum(-1).mean(1), mask)
