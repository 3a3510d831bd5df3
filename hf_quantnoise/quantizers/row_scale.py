"""A scale for each output row, folded into the fit of the codebook: W_row = s_row * codewords.

Rows of very different norms then share codewords by their direction. Scale and codebook are fitted
in turn, each by least squares given the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# After the first clustering scale and codebook follow each other this often, in so many iterations
# of k-means: most is gained by the first scale.
ROUNDS = 2
ROUND_ITERATIONS = 5
# A row so much smaller than the others, in squares, has no say in the codebook.
LEAST_WEIGHT = 1e-12

# (matrix, importance, codebook to start from, iterations) -> codebook, matrix decoded with it
Cluster = Callable[[Tensor, Tensor | None, Tensor | None, int], tuple[Tensor, Tensor]]


def as_divisor(scale: Tensor) -> Tensor:
    """A scale to divide by: a row of scale 0 decodes to zeros whatever its codes are."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def fit_row_scale(
    matrix: Tensor,
    importance: Tensor | None,
    start: Tensor | None,
    n_iter: int,
    cluster: Cluster,
) -> tuple[Tensor, Tensor]:
    """Fits a codebook and a scale per row.

    The squared error of a row is s^2 ||W_row / s - codewords||^2: its blocks are clustered divided
    by s, with s^2 as their weight.

    Args:
        matrix: shape (rows, columns), float32.
        importance: as in ``Quantizer.fit``.
        start: a codebook to start from.
        n_iter: iterations of the first clustering.
        cluster: fits a codebook to a matrix.

    Returns:
        The codebook; and s, shape (rows, 1), whose mean before the last fit is about 1.
    """
    scale = matrix.square().mean(1, keepdim=True).sqrt()
    scale = as_divisor(scale / as_divisor(scale.mean()))
    weights = matrix.new_ones(1, 1) if importance is None else importance
    for number in range(1 + ROUNDS):
        iterations = ROUND_ITERATIONS if number else n_iter
        divisor = as_divisor(scale)
        squares = divisor.square().clamp(min=LEAST_WEIGHT)
        start, decoded = cluster(matrix / divisor, weights * squares, start, iterations)
        energy = (weights * decoded.square()).sum(1, keepdim=True)
        fitted = (weights * decoded * matrix).sum(1, keepdim=True) / as_divisor(energy)
        scale = torch.where(energy > 0, fitted, scale)
    return start, scale
