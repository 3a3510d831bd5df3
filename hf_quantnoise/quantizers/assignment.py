"""The nearest centroid of each point, in chunks.

The distances ||x - c||^2 / 2 of a chunk of points to all centroids are one matrix product, of
(x, 1, ||x||^2 / 2) and (-c, ||c||^2 / 2, 1). With a weight h for each element of each point the
distance is sum_j h_j (x_j - c_j)^2 / 2, again one product, of (h x, h, sum_j h_j x_j^2 / 2) and
(-c, c^2 / 2, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BYTES = 4 * 2**20
MAX_INDEX_BITS = 10
# Chunks of points that are prepared together, which costs less than one by one.
CHUNKS = 16


def chunk_rows(n_centroids: int) -> int:
    """Return the points per chunk whose float32 distances fit in MAX_BYTES and in cache."""
    return max(1, min(MAX_BYTES // (4 * n_centroids), max(2**19 // n_centroids + 1, 512)))


def _columns(centroids: Tensor, weighted: bool) -> Tensor:
    """Return (-c, ||c||^2 / 2, 1), shape (d + 2, K); for weights (-c, c^2 / 2, 1), (2 d + 1, K)."""
    half = centroids.square() / 2
    half = half if weighted else half.sum(1, keepdim=True)
    ones = centroids.new_ones(len(centroids), 1)
    return torch.cat([-centroids, half, ones], dim=1).t().contiguous()


def _augmented(points: Tensor, weights: Tensor | None) -> Tensor:
    """Return (x, 1, ||x||^2 / 2), shape (N, d + 2), or (h x, h, sum h x^2 / 2), (N, 2 d + 1)."""
    if weights is None:
        half = points.square().sum(1, keepdim=True) / 2
        return torch.cat([points, points.new_ones(len(points), 1), half], dim=1)
    weighted = weights * points
    half = (weighted * points).sum(1, keepdim=True) / 2
    return torch.cat([weighted, weights, half], dim=1)


def _nearest(augmented: Tensor, columns: Tensor, index: Tensor, scratch: Tensor) -> Tensor:
    """Return the index of the smallest distance of each point; overwrites scratch, shape (N, K).

    ``index`` is 0 to K - 1, int32.

    Up to 1024 centroids, index and distance are packed into one integer: positive float32 values
    are ordered like the integers of their bits, so the index can use the lowest bits, and one
    ``amin``, much faster than ``argmin``, gives both. This rounds distances to 13 to 22 bits, and
    ties go to the lowest index. Each point's distances are made positive by its own ||x||^2 / 2: a
    constant for all points would leave no digits to a point when another is an outlier.
    """
    n_centroids = columns.shape[1]
    index_bits = (n_centroids - 1).bit_length()
    torch.mm(augmented, columns, out=scratch)
    if index_bits > MAX_INDEX_BITS:
        return scratch.argmin(1)
    bits = scratch.view(torch.int32)
    # The sign bit is cleared too: rounding can make a distance near 0 slightly negative.
    bits &= 2**31 - 2**index_bits
    bits |= index
    return bits.amin(1) & (2**index_bits - 1)


def assign(
    points: Tensor,
    centroids: Tensor,
    weights: Tensor | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Return the nearest centroid (K, d) of each point (N, d), shape (N,), of an integer dtype.

    Points are centered first, so a common offset costs no precision. If a point's squared distances
    to two centroids differ by less than a relative 2^-13, or by the float32 rounding of its squared
    norm, either may be returned. Codes do not depend on other points. ``weights`` are those of
    :func:`kmeans`.
    """
    if weights is not None and weights.shape[1] == 1:
        weights = None  # a constant weight per point does not change its minimum
    center = centroids.float().mean(0)
    centroids = centroids.float() - center
    columns = _columns(centroids, weights is not None)
    step = chunk_rows(len(centroids))
    codes = torch.empty(len(points), dtype=dtype, device=points.device)
    # One scratch tensor for all chunks: allocating one per chunk, between smaller tensors that stay
    # alive, fragments the heap by gigabytes.
    scratch = columns.new_empty(min(step, len(points)), len(centroids))
    index = torch.arange(len(centroids), device=points.device, dtype=torch.int32)
    for start in range(0, len(points), CHUNKS * step):
        part = slice(start, start + CHUNKS * step)
        part_weights = None if weights is None else weights[part].float()
        if part_weights is not None:  # same codes, and extreme weights do not overflow
            part_weights = part_weights / part_weights.mean(1, keepdim=True)
        augmented = _augmented(points[part].float() - center, part_weights)
        for own, chunk in zip(codes[part].split(step), augmented.split(step), strict=True):
            own.copy_(_nearest(chunk, columns, index, scratch[: len(chunk)]))
    return codes


def nearest_few(
    points: Tensor, centroids: Tensor, count: int, weights: Tensor | None = None
) -> Tensor:
    """Return the nearest centroids of each point in order, (N, min(count, K)). Not chunked."""
    distances = _augmented(points, weights) @ _columns(centroids, weights is not None)
    return distances.topk(min(count, len(centroids)), dim=1, largest=False).indices


def squared_errors(points: Tensor, decoded: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the (weighted) squared distance of each point to its decoded value, shape (N,)."""
    squares = (points - decoded).square()
    return (squares if weights is None else weights * squares).sum(1)
