"""Observers: which range of a weight N bits are spread over (sections 3.1, 7.7 and table 10).

An observer names candidates, and the one with the lowest squared error is taken, group by group:
a histogram or a channel's own range is only ever used where it is better than the plain range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..configuration import OBSERVERS

# Rows whose intermediate values are held at a time while errors are measured.
CHUNK_NUMBERS = 2**20
BINS = 2048
# The histogram observer's range begins and ends at one of so many steps (and no more: all pairs
# of them are tried).
STEPS = 64

Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Observer:
    """How the range of a weight is found.

    Attributes:
        candidates: (matrix (rows, columns) in float32, bits, its extremes) -> ranges (low, high),
            each a pair of scalars or of (rows, 1).
        per_channel: whether there is a range for each row (the output dimension).
        running: whether the extremes of earlier observations widen the range.
    """

    candidates: Callable[[Tensor, int, Range], list[Range]]
    per_channel: bool = False
    running: bool = False


def extremes(matrix: Tensor, running: Range | None = None) -> Range:
    """(min W, max W), scalars; widened by the extremes of earlier matrices."""
    low, high = torch.aminmax(matrix)
    if running is None:
        return low, high
    return torch.minimum(low, running[0]), torch.maximum(high, running[1])


def _minmax(matrix: Tensor, bits: int, whole: Range) -> list[Range]:
    return [whole]


def _channel(matrix: Tensor, bits: int, whole: Range) -> list[Range]:
    low, high = torch.aminmax(matrix, dim=1, keepdim=True)
    return [(low, high), (whole[0].expand_as(low), whole[1].expand_as(high))]


def _histogram(matrix: Tensor, bits: int, whole: Range) -> list[Range]:
    if not bool(whole[1] > whole[0]):
        return [whole]
    return [range_of_histogram(histogram(matrix, *whole), *whole, bits), whole]


def range_of_histogram(counts: Tensor, low: Tensor, high: Tensor, bits: int) -> Range:
    """The range between two of STEPS + 1 places that has the lowest squared error.

    Args:
        counts: numbers in each of BINS equal bins from ``low`` to ``high``, float32.
        low, high: scalars, ``low < high``.
        bits: N.
    """
    places = torch.linspace(0, 1, STEPS + 1, device=counts.device)
    first, last = torch.triu_indices(STEPS + 1, STEPS + 1, 1, device=counts.device)
    start, width = places[first][:, None], (places[last] - places[first])[:, None]
    centres = (torch.arange(BINS, device=counts.device) + 0.5) / BINS
    scale = width / (2**bits - 1)
    levels = ((centres - start) / scale).round_().clamp_(0, 2**bits - 1)
    errors = levels.mul_(scale).add_(start).sub_(centres).square_() @ counts
    best = errors.argmin()
    found = low + (high - low) * start[best, 0]
    return found, found + (high - low) * width[best, 0]


def histogram(matrix: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Share of the numbers in each of BINS equal bins from low to high, float32; what lies outside
    counts in the outermost bins."""
    counts = torch.zeros(BINS, dtype=torch.int64, device=matrix.device)
    for part in matrix.reshape(-1).split(CHUNK_NUMBERS):
        bins = ((part - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
        counts += torch.bincount(bins, minlength=BINS)
    return counts / matrix.numel()


OBSERVERS.register("minmax")(Observer(_minmax))
OBSERVERS.register("channel")(Observer(_channel, per_channel=True))
OBSERVERS.register("histogram")(Observer(_histogram, running=True))
