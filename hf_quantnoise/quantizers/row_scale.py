"""A scale for each output row, fitted together with the codebook: W_row = s_row * centroids.

Rows of very different norms then share centroids by direction. Scale and codebook are fitted in
turn, each by least squares given the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Rounds of scale and codebook after the first clustering, and iterations of k-means in each: the
# first scale gains most.
ROUNDS = 2
ROUND_ITERATIONS = 5
# Least squared scale, as a weight: k-means requires positive weights.
MIN_WEIGHT = 1e-12


def as_divisor(scale: Tensor) -> Tensor:
    """Replace scales of 0 by 1 for a division: such a row decodes to zeros whatever its codes."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def lost_rows(matrix: Tensor) -> int:
    """Return how many rows have a scale that float16 cannot hold, or 0 if that does no harm.

    Scales that are too large would be clamped. Rows that are too small are stored as zeros, which
    is harmless for a few of them (unused words). If they are most of the rows, the mean that scales
    are relative to is that of a few large rows, and the weight would be lost.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norms = torch.linalg.vector_norm(matrix, dim=1, dtype=dtype)
    scale = (norms / as_divisor(norms.mean())).to(torch.float16)
    large, small = int((~torch.isfinite(scale)).sum()), int(((norms > 0) & (scale == 0)).sum())
    return large or (small if 2 * small > len(matrix) else 0)


def refit_scale(matrix: Tensor, weights: Tensor, decoded: Tensor, scale: Tensor) -> Tensor:
    """Return the scale of each row of least squared error; unchanged if it decodes to zeros.

    ``decoded`` is the matrix of the centroids, ``weights`` is broadcastable to it.
    """
    energy = (weights * decoded.square()).sum(1, keepdim=True)
    fitted = (weights * decoded * matrix).sum(1, keepdim=True) / as_divisor(energy)
    return torch.where(energy > 0, fitted, scale)


def row_weights(scale: Tensor) -> Tensor:
    """Return s^2, the weight of a row that is divided by s, for k-means."""
    return as_divisor(scale).square().clamp(min=MIN_WEIGHT)


def fit_row_scale(
    matrix: Tensor,
    importance: Tensor | None,
    start: Tensor | None,
    n_iter: int,
    cluster: Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Callable[[], Tensor]]],
) -> tuple[Tensor, Tensor]:
    """Fit a codebook and a scale per row; return both, the scale s as (rows, 1) with mean about 1.

    The squared error of a row is s^2 ||W_row / s - centroids||^2: its blocks are divided by s and
    clustered with weight s^2. ``matrix`` is float32, ``start`` the initial codebook if any,
    ``n_iter`` the iterations of the first clustering, and ``cluster`` maps (matrix, importance,
    initial codebook, iterations) to a codebook and a function that decodes the matrix.
    """
    scale = matrix.square().mean(1, keepdim=True).sqrt()
    scale = as_divisor(scale / as_divisor(scale.mean()))
    weights = matrix.new_ones(1, 1) if importance is None else importance
    for step in range(1 + ROUNDS):
        iterations = ROUND_ITERATIONS if step else n_iter
        divided, of_rows = matrix / as_divisor(scale), weights * row_weights(scale)
        start, decode = cluster(divided, of_rows, start, iterations)
        scale = refit_scale(matrix, weights, decode(), scale)
    assert start is not None  # there was at least one round
    return start, scale
