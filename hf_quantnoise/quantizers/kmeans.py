"""k-means in plain torch: vectorized, chunked, seeded, and without empty clusters.

The distances ||x - c||^2 / 2 of a chunk of points to all centroids are one matrix product, of
(x, 1, ||x||^2 / 2) and (-c, ||c||^2 / 2, 1). With a weight h for each element of each point the
distance is sum_j h_j (x_j - c_j)^2 / 2, again one product, of (h x, h, sum_j h_j x_j^2 / 2) and
(-c, c^2 / 2, 1). A centroid is then the weighted mean of its points, coordinate by coordinate.

A step moves each centroid past the mean of its points, to c + STEP (mean - c). For given codes the
objective is a parabola with its minimum at the mean, so a step below 2 lowers it, and the next
codes follow in fewer iterations. The last step is to the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import require_finite
from .packing import code_dtype

MAX_BYTES = 4 * 2**20
# Points of the seeding, at least, and for each centroid.
SEEDING_POINTS, SEEDING_POINTS_EACH = 2048, 8
SAMPLE_POINTS = 65_536
FULL_ITERATIONS = 6
MAX_INDEX_BITS = 10
# Of 1, 1.5, 1.6 and 1.8 the best for normal and Student-t blocks of 4 and 8.
STEP = 1.8
# Above SAMPLE_POINTS points, iterations on the sample and on all points end when at most these
# shares of the codes change.
SAMPLE_SETTLED, SETTLED = 0.05, 0.04
# Chunks of points that are prepared together, which costs less than one by one.
CHUNKS = 16
# Points of which copies are made at a time.
COPIED_POINTS = 2**19


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


def sample_indices(n_points: int, n_samples: int, generator: torch.Generator) -> Tensor:
    """Return distinct random indices; all indices in order if there are not more points."""
    if n_points <= n_samples:
        return torch.arange(n_points)
    dtype = torch.int32 if n_points < 2**31 else torch.int64
    order = torch.randperm(n_points, generator=generator, dtype=dtype)
    return order[:n_samples].long()  # a copy, which frees the others


def _seed_centroids(
    points: Tensor, weights: Tensor | None, n_centroids: int, generator: torch.Generator
) -> Tensor:
    """Return the initial centroids of greedy k-means++ on a sample.

    Of a few candidates, picked in proportion to their squared distance, the one that reduces the
    objective most becomes the next centroid.
    """
    size = max(SEEDING_POINTS, SEEDING_POINTS_EACH * n_centroids)
    chosen = sample_indices(len(points), size, generator).to(points.device)
    sample = points[chosen]
    sample_weights = sample.new_ones(1, 1) if weights is None else weights[chosen]
    weighted = sample_weights * sample
    norms = (weighted * sample).sum(1)
    weight_columns = sample_weights.expand_as(sample).t()
    first = int(torch.randint(len(sample), (1,), generator=generator))
    centroids = sample[first].expand(n_centroids, -1).clone()
    distances = (sample_weights * (sample - centroids[0]).square()).sum(1)
    trials = 2 + int(math.log(n_centroids))
    uniform = torch.rand(n_centroids, trials, generator=generator, dtype=torch.float64)
    uniform = uniform.to(points.device)
    for k in range(1, n_centroids):
        picks = _pick_by_distance(distances, uniform[k])
        if weights is None:
            squares = norms[picks][:, None]
        else:
            squares = sample[picks].square() @ weight_columns
        new = norms + squares - 2 * (sample[picks] @ weighted.t())
        new = torch.minimum(new.clamp_(min=0), distances)
        best = new.sum(1).argmin()
        centroids[k] = sample[picks[best]]
        distances = new[best]
    return centroids


def _pick_by_distance(distances: Tensor, uniform: Tensor) -> Tensor:
    """Return indices sampled in proportion to distances, from uniform values in [0, 1)."""
    cumulated = distances.double().cumsum(0)
    picks = torch.searchsorted(cumulated, uniform * cumulated[-1], right=True)
    return picks.clamp_(max=len(distances) - 1)


def update_centroids(
    points: Tensor,
    weights: Tensor | None,
    codes: Tensor,
    centroids: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return the means of the clusters; empty ones restart at points of large squared error."""
    n_centroids = len(centroids)
    means = cluster_means(points, codes, n_centroids, weights)
    empty = (torch.bincount(codes, minlength=n_centroids) == 0).nonzero().flatten()
    if len(empty):
        errors = torch.cat(
            [
                squared_errors(points[part], means[codes[part].int()], _part_of(weights, part))
                for part in _parts(len(points))
            ]
        )
        if bool(errors.any()):
            uniform = torch.rand(len(empty), generator=generator, dtype=torch.float64)
            means[empty] = points[_pick_by_distance(errors, uniform.to(points.device))]
        else:  # every point equals its centroid, so there is nothing to split
            means[empty] = centroids[empty]
    return means


def cluster_means(
    points: Tensor, codes: Tensor, n_centroids: int, weights: Tensor | None = None
) -> Tensor:
    """Return the (weighted) mean of each cluster, (n_centroids, d), float32; 0 if it is empty."""
    sums = points.new_zeros(n_centroids, points.shape[1])
    mass = None if weights is None else torch.zeros_like(sums)
    for part in _parts(len(points)):
        index, own = codes[part].int(), points[part]
        if mass is not None:
            own_weights = weights[part]
            mass.index_add_(0, index, own_weights.expand_as(own))
            own = own_weights * own
        sums.index_add_(0, index, own)
    if mass is None:
        return sums / torch.bincount(codes, minlength=n_centroids).clamp(min=1)[:, None]
    return sums / mass.clamp(min=torch.finfo(mass.dtype).tiny)


def _parts(n_points: int) -> Iterator[slice]:
    """Return slices of COPIED_POINTS points."""
    for start in range(0, n_points, COPIED_POINTS):
        yield slice(start, start + COPIED_POINTS)


def _part_of(weights: Tensor | None, part: slice) -> Tensor | None:
    return None if weights is None else weights[part]


def _iterate(points, weights, centroids, n_iter, settled, generator) -> tuple[Tensor, Tensor]:
    """Run iterations until at most a share of the codes changes; return centroids and codes."""
    dtype = code_dtype((len(centroids) - 1).bit_length())  # there are two sets of codes at a time
    codes, changed = assign(points, centroids, weights, dtype), 1.0
    for remaining in reversed(range(n_iter)):
        means = update_centroids(points, weights, codes, centroids, generator)
        is_last = remaining == 0 or changed <= settled
        centroids = means if is_last else torch.lerp(centroids, means, STEP)
        new = assign(points, centroids, weights, dtype)
        changed = int((new != codes).count_nonzero()) / len(codes)
        codes = new
        if is_last and changed <= settled:
            break
    return centroids, codes


def _check(points: Tensor, weights: Tensor | None, n_centroids: int, init: Tensor | None) -> None:
    if points.dim() != 2 or not len(points):
        raise ValueError(f"invalid points: got {tuple(points.shape)}, expected (N, d) with N > 0")
    require_finite(points)
    n_points, d = points.shape
    if init is not None and init.shape != (n_centroids, d):
        raise ValueError(f"invalid init: got {tuple(init.shape)}, expected {(n_centroids, d)}")
    if weights is None:
        return
    shape = tuple(weights.shape)
    if shape not in ((n_points, d), (n_points, 1)):
        raise ValueError(f"invalid weights: got {shape}, expected {n_points, d} or {n_points, 1}")
    if not (torch.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("invalid weights: expected finite values above 0")


@torch.no_grad()
def kmeans(
    points: Tensor,
    n_centroids: int,
    *,
    n_iter: int = 20,
    seed: int = 0,
    init: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit a codebook: minimize the sum of ||b - c[I]||^2 over all blocks (section 3.2).

    Above SAMPLE_POINTS points a sample is clustered first, then all points for six iterations: the
    same objective in less time. torch's global random state is unchanged.

    Args:
        points: blocks, shape (N, d), any float dtype; computed in float32.
        n_centroids: K; may exceed the number of distinct points, which gives duplicates.
        n_iter: maximum number of iterations.
        seed: seed of the initial centroids and of the restarts of empty clusters.
        init: initial centroids, shape (K, d), instead of k-means++.
        weights: h > 0, shape (N, d) or (N, 1): the sum is then that of h (b - c[I])^2, element by
            element, for codes and centroids. None weighs all alike.

    Returns:
        The centroids, shape (K, d), float32, and the codes of the points, shape (N,), uint8 for
        up to 256 centroids (``int()`` makes them an index), else int32.
    """
    _check(points, weights, n_centroids, init)
    points = points.detach().float()
    if weights is not None:
        weights = weights.detach().float()
    generator = torch.Generator().manual_seed(seed)
    runs = [(points, weights, n_iter, 0.0)]
    if len(points) > SAMPLE_POINTS:
        chosen = sample_indices(len(points), SAMPLE_POINTS, generator).to(points.device)
        sample_weights = None if weights is None else weights[chosen]
        runs = [
            (points[chosen], sample_weights, n_iter, SAMPLE_SETTLED),
            (points, weights, min(n_iter, FULL_ITERATIONS), SETTLED),
        ]
    if init is None:
        centroids = _seed_centroids(*runs[0][:2], n_centroids, generator)
    else:
        centroids = init.detach().float().clone()
    for run_points, run_weights, iterations, settled in runs:
        centroids, codes = _iterate(
            run_points, run_weights, centroids, iterations, settled, generator
        )
    return centroids, codes
