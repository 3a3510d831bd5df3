"""k-means in plain torch: vectorized, chunked, seeded, and without empty clusters.

A step moves each centroid past the mean of its points, to c + STEP (mean - c). For given codes the
objective is a parabola with its minimum at the mean, so a step below 2 lowers it, and the next
codes follow in fewer iterations. The last step is to the mean. With a weight h for each element of
each point a centroid is the weighted mean of its points, coordinate by coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .assignment import assign, squared_errors
from .base import require_finite
from .packing import code_dtype

# Points of the seeding, at least, and for each centroid.
SEEDING_POINTS, SEEDING_POINTS_EACH = 2048, 8
SAMPLE_POINTS = 65_536
FULL_ITERATIONS = 6
# Of 1, 1.5, 1.6 and 1.8 the best for normal and Student-t blocks of 4 and 8.
STEP = 1.8
# Above SAMPLE_POINTS points, iterations on the sample and on all points end when at most these
# shares of the codes change.
SAMPLE_SETTLED, SETTLED = 0.05, 0.04
# Points of which copies are made at a time.
COPIED_POINTS = 2**19
# Above this number, points are sampled without a permutation of all.
MAX_PERMUTED = 2**24


def sample_indices(n_points: int, n_samples: int, generator: torch.Generator) -> Tensor:
    """Return distinct random indices; all indices in order if there are not more points."""
    if n_points <= n_samples:
        return torch.arange(n_points, device="cpu")
    if n_points <= max(MAX_PERMUTED, 64 * n_samples):
        order = torch.randperm(n_points, generator=generator, dtype=torch.int32, device="cpu")
        return order[:n_samples].long()  # a copy, which frees the others
    drawn = torch.randint(n_points, (2 * n_samples,), generator=generator, device="cpu")
    values, index = drawn.unique(return_inverse=True)  # sorted, which the result must not be
    first = torch.full_like(values, len(drawn))
    first.scatter_reduce_(0, index, torch.arange(len(drawn), device="cpu"), "amin")
    return values[first.argsort()[:n_samples]]


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
    first = int(torch.randint(len(sample), (1,), generator=generator, device="cpu"))
    centroids = sample[first].expand(n_centroids, -1).clone()
    distances = (sample_weights * (sample - centroids[0]).square()).sum(1)
    trials = 2 + int(math.log(n_centroids))
    uniform = _uniform(n_centroids, trials, generator=generator).to(points.device)
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


def _uniform(*size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*size, generator=generator, dtype=torch.float64, device="cpu")


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
        uniform = _uniform(len(empty), generator=generator).to(points.device)
        chosen = _pick_by_error(points, weights, codes, means, uniform)
        means[empty] = centroids[empty] if chosen is None else points[chosen]
    return means


def _pick_by_error(
    points: Tensor, weights: Tensor | None, codes: Tensor, means: Tensor, uniform: Tensor
) -> Tensor | None:
    """Return indices of points, sampled in proportion to their squared error.

    As :func:`_pick_by_distance` of all errors, which are computed for one part of the points at a
    time. None if every point equals its mean.
    """
    parts = list(_parts(len(points)))

    @lru_cache(maxsize=1)  # a single part is computed once
    def cumulated(number: int) -> Tensor:
        part = parts[number]
        own = None if weights is None else weights[part]
        return squared_errors(points[part], means[codes[part].int()], own).double().cumsum(0)

    sums = torch.stack([cumulated(number)[-1] for number in range(len(parts))])
    ends = sums.cumsum(0)
    if not ends[-1] > 0:
        return None
    wanted = uniform * ends[-1]
    numbers = torch.searchsorted(ends, wanted, right=True).clamp_(max=len(parts) - 1)
    picks = torch.empty_like(numbers)
    for number in numbers.unique().tolist():
        own, before = numbers == number, ends[number] - sums[number]
        found = torch.searchsorted(cumulated(number), wanted[own] - before, right=True)
        picks[own] = found.clamp_(max=len(cumulated(number)) - 1) + parts[number].start
    return picks


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
