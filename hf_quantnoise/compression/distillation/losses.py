"""What the compressed model learns of the uncompressed one (3.2): the divergences, each a mean.

All of them are computed in float32, whatever the precision of the models. ``counted`` says which
positions of a sequence count; where none does, the divergence is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    if counted is None:
        return torch.mean(values)
    values = values[counted]
    return torch.mean(values) if values.numel() else values.sum()


def _same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher's logits are {tuple(teacher.shape)} and the student's "
            f"{tuple(student.shape)}; the teacher needs the student's head and labels"
        )
    return student.float(), teacher.float()


def softmax_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, counted: Tensor | None = None
) -> Tensor:
    """Of classes that exclude each other: KL(softmax(t / T) || softmax(s / T)) * T^2.

    Args:
        student, teacher: logits s and t, shape (..., classes).
        temperature: T.
        counted: boolean, shape (...).

    Raises:
        ValueError: if the logits have different shapes.
    """
    student, teacher = _same_shape(student, teacher)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return _mean(divergence, counted) * temperature**2


def sigmoid_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, counted: Tensor | None = None
) -> Tensor:
    """Of labels that do not exclude each other: with p = sigmoid(t / T) and q = sigmoid(s / T),
    (p log(p / q) + (1 - p) log((1 - p) / (1 - q))) * T^2, the mean over labels too.

    Arguments and errors are those of :func:`softmax_divergence`.
    """
    student, teacher = _same_shape(student, teacher)
    student, teacher = student / temperature, teacher / temperature
    p = torch.sigmoid(teacher)
    yes = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return _mean(yes + no, counted) * temperature**2


def squared_error(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, counted: Tensor | None = None
) -> Tensor:
    """Of numbers (regression): (s - t)^2. They have no temperature.

    Arguments and errors are those of :func:`softmax_divergence`.
    """
    student, teacher = _same_shape(student, teacher)
    return _mean(F.mse_loss(student, teacher, reduction="none"), counted)


def hidden_state_error(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """Of the outputs of a layer: ||s - t||^2 / ||t||^2, the mean over positions.

    The relative error has no unit: a weight means the same for any width and any scale of the
    numbers, and one position with huge numbers (attention sinks) does not outweigh the others.

    Args:
        student, teacher: shape (batch, positions, width); or those of a convolution, (batch,
            channels, height, width), where each image is one position: single places of a feature
            map are often all zero.
        counted: boolean, shape (batch, positions).

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"distill_hidden: the teacher's hidden states are {tuple(teacher.shape)} and the "
            f"student's {tuple(student.shape)}; take a teacher of the same width, or set "
            "distill_hidden=0 (attention maps have no width: see distill_attention)"
        )
    student, teacher = student.float(), teacher.float()
    if student.dim() > 3:
        student, teacher = student.flatten(1), teacher.flatten(1)
    error = (student - teacher).square().sum(-1)
    return _mean(error / teacher.square().sum(-1).clamp_min(_TINY), counted)


def attention_divergence(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Of the attention maps of a layer: KL(a_t || a_s) over the keys that each position reads, the
    mean over heads and positions (as in MiniLM).

    Args:
        student, teacher: shape (batch, heads, positions, keys), rows of probabilities.
        counted: boolean, shape (batch, positions).
        keys: boolean, shape (batch, keys): those that are no padding. Rows are normalised over
            them once more, since those of half precision do not add up to one.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"distill_attention: the teacher's attention maps are {tuple(teacher.shape)} and the "
            f"student's {tuple(student.shape)} (batch, heads, positions, keys); take a teacher "
            "with as many heads, or set distill_attention=0"
        )
    maps = []
    for attention in (student.float(), teacher.float()):
        if keys is not None:
            attention = attention * keys[:, None, None, :]
        maps.append(attention / attention.sum(-1, keepdim=True).clamp_min(_TINY))
    student, teacher = maps
    ratio = teacher.clamp_min(_TINY).log() - student.clamp_min(_TINY).log()
    return _mean((teacher * ratio).sum(-1).mean(1), counted)


def matched_layers(
    student: int, teacher: int, layers: str | Sequence[int]
) -> list[tuple[int, int]]:
    """Which layer of the teacher each layer of the student learns from.

    Layers are matched evenly (TinyBERT): the n-th of S has the floor(n T / S)-th of T, so the last
    has the last.

    Args:
        student, teacher: number of layers, S and T.
        layers: the student's layers that learn: ``"all"``, ``"last"``, or places counted from 0
            (negative ones from the end), as a list or with commas between them.

    Returns:
        Pairs of places, counted from 0.

    Raises:
        ValueError: if the student has no such layer.
    """
    places = {"all": list(range(student)), "last": [student - 1]}.get(str(layers))
    if places is None:
        places = read_layers(layers)
    if wrong := [place for place in places if not -student <= place < student]:
        raise ValueError(
            f"distill_layers={layers!r}: the student has {student} layers, so there is no layer "
            f"{wrong[0]}; take 0 to {student - 1}, 'all' or 'last'"
        )
    places = [place % student for place in places]
    return [(place, max(1, (place + 1) * teacher // student) - 1) for place in places]


def read_layers(layers: str | Sequence[int]) -> list[int]:
    """Places of layers from a list, or from text with commas between them.

    Raises:
        ValueError: if they are no integers.
    """
    parts = layers.split(",") if isinstance(layers, str) else layers
    try:
        places = [int(part) for part in parts]
    except (TypeError, ValueError):
        places = []
    if not places or (not isinstance(layers, str) and places != list(layers)):
        raise ValueError(
            f"distill_layers={layers!r} must be 'all', 'last', or places of layers counted from 0, "
            "e.g. '0,3,5' or [0, 3, 5]"
        )
    return places
