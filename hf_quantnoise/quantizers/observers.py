"""Observers: the range of a weight that N bits cover (sections 3.1, 7.7 and table 10).

An observer proposes candidate ranges, and the one with the lowest squared error is used. A
histogram range, or the range of a channel, is therefore never worse than the min-max range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..configuration import OBSERVERS
from .base import CHUNK_ELEMENTS

BINS = 2048
# The ends of a histogram range are multiples of this fraction of min-max; all pairs are tried.
STEPS = 64

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Observer:
    """How the range of a weight is found."""

    # (matrix (rows, columns) in float32, bits, its extremes) -> ranges (low, high), each a pair of
    # scalars or of shape (rows, 1)
    candidates: Callable[[Tensor, int, Range], list[Range]]
    per_channel: bool = False  # whether each row (output feature) has its own range
    running: bool = False  # whether the extremes of earlier observations widen the range


def extremes(matrix: Tensor, running: Range | None = None) -> Range:
    """Return (min W, max W), scalars, widened by the extremes of earlier matrices."""
    low, high = torch.aminmax(matrix)
    if running is None:
        return low, high
    return torch.minimum(low, running[0]), torch.maximum(high, running[1])


def _minmax(matrix: Tensor, bits: int, full_range: Range) -> list[Range]:
    return [full_range]


def _channel(matrix: Tensor, bits: int, full_range: Range) -> list[Range]:
    low, high = matrix.amin(1, keepdim=True), matrix.amax(1, keepdim=True)  # aminmax is slow here
    return [(low, high), (full_range[0].expand_as(low), full_range[1].expand_as(high))]


def _histogram(matrix: Tensor, bits: int, full_range: Range) -> list[Range]:
    if not bool(full_range[1] > full_range[0]):
        return [full_range]
    counts = histogram(matrix, *full_range)
    return [range_of_histogram(counts, *full_range, bits), full_range]


def range_of_histogram(counts: Tensor, low: Tensor, high: Tensor, bits: int) -> Range:
    """Return the range of lowest squared error between two of STEPS + 1 ends.

    ``counts`` are those of :func:`histogram` from ``low`` to ``high``, with ``low < high``.
    """
    ends = torch.linspace(0, 1, STEPS + 1, device=counts.device)
    first, last = torch.triu_indices(STEPS + 1, STEPS + 1, 1, device=counts.device)
    start, width = ends[first][:, None], (ends[last] - ends[first])[:, None]
    centers = (torch.arange(BINS, device=counts.device) + 0.5) / BINS
    errors, step = [], CHUNK_ELEMENTS // BINS
    for own, own_width in zip(start.split(step), width.split(step), strict=True):
        scale = own_width / (2**bits - 1)
        levels = ((centers - own) / scale).round_().clamp_(0, 2**bits - 1)
        errors.append(levels.mul_(scale).add_(own).sub_(centers).square_() @ counts)
    best = torch.cat(errors).argmin()
    best_low = low + (high - low) * start[best, 0]
    return best_low, best_low + (high - low) * width[best, 0]


def histogram(matrix: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the share of the values in each of BINS equal bins from low to high, float32.

    Values outside count in the outermost bins.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device=matrix.device)
    for part in matrix.reshape(-1).split(CHUNK_ELEMENTS):
        bins = ((part - low) * (BINS / (high - low))).int().clamp_(0, BINS - 1)
        counts += torch.bincount(bins, minlength=BINS)
    return counts / matrix.numel()


OBSERVERS.register("minmax")(Observer(_minmax))
OBSERVERS.register("channel")(Observer(_channel, per_channel=True))
OBSERVERS.register("histogram")(Observer(_histogram, running=True))
