"""k-means in plain torch: vectorised, chunked, seeded, and never with an empty cluster.

The distance of all points of a chunk to all centroids is one matrix product: with the point
augmented by a one and the centroid by half its squared norm, ||c||^2 / 2 - x c is ||x - c||^2 / 2
up to half the squared norm of the point, which is added to its row of the product. Chunks stay in
cache, and their size in bytes is bounded.

With a weight h for each number of each point the distance is sum_j h_j (x_j - c_j)^2: one product
again, of (h x, h) and (-c, c^2 / 2), and a centroid is the weighted mean of its points, coordinate
by coordinate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import require_finite

MAX_BYTES = 4 * 2**20
SEEDING_POINTS = 16_384
SAMPLE_POINTS = 65_536
FULL_ITERATIONS = 3
MOST_INDEX_BITS = 10


@dataclass(frozen=True)
class KMeansResult:
    """Outcome of :func:`kmeans`.

    Attributes:
        centroids: shape (n_centroids, d), float32.
        codes: nearest centroid of each point, shape (N,), int64.
        objective: sum of squared distances (section 3.2), weighted where the points are; computed
            from the codes.
        n_iter: iterations run over all points or over the sample.
    """

    centroids: Tensor
    codes: Tensor
    objective: float
    n_iter: int


def chunk_rows(n_centroids: int, max_bytes: int = MAX_BYTES) -> int:
    """Points per chunk, so that a float32 distance matrix stays within ``max_bytes``; at least 1,
    and at most about 1024 at 256 centroids (512 at more), which fits in cache."""
    return max(1, min(max_bytes // (4 * n_centroids), max(2**18 // n_centroids + 1, 512)))


def _columns(centroids: Tensor, weighted: bool) -> Tensor:
    """-c on top of ||c||^2 / 2, (d + 1, K); on top of c^2 / 2, (2 d, K), where points are
    weighted: what the rows of :func:`_augmented` are multiplied by."""
    half = centroids.square() / 2
    half = half if weighted else half.sum(1, keepdim=True)
    return torch.cat([-centroids, half], dim=1).t().contiguous()


def _augmented(points: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.cat([points, points.new_ones(len(points), 1)], dim=1)
    return torch.cat([weights * points, weights], dim=1)


def _nearest(points: Tensor, columns: Tensor, weights: Tensor | None, distances: Tensor) -> Tensor:
    """Index of the smallest distance of each point, shape (N,). ``distances``, shape (N, K), is
    written over.

    Up to 1024 centroids index and distance travel in one number: a positive float32 is ordered as
    the integer of its bits, so the index can stand in its lowest bits and one ``amin``, much faster
    than ``argmin``, gives both. It rounds distances to 13 to 22 bits, and breaks ties by index. The
    digits are those of each point's own distances: ||x||^2 / 2 of another, added to all to make
    them positive, would leave none to a point beside an outlier.
    """
    n_centroids = columns.shape[1]
    index_bits = (n_centroids - 1).bit_length()
    augmented = _augmented(points, weights)
    if index_bits > MOST_INDEX_BITS:
        return torch.mm(augmented, columns, out=distances).argmin(1)
    squares = points.square() if weights is None else weights * points.square()
    torch.addmm(squares.sum(1, keepdim=True) / 2, augmented, columns, out=distances)
    bits = distances.view(torch.int32)
    # The sign goes too: rounding can leave a distance of about 0 a little below it.
    bits &= 2**31 - 2**index_bits
    bits |= torch.arange(n_centroids, device=bits.device, dtype=torch.int32)
    return (bits.amin(1) & (2**index_bits - 1)).long()


def assign(
    points: Tensor, centroids: Tensor, max_bytes: int = MAX_BYTES, weights: Tensor | None = None
) -> Tensor:
    """Nearest centroid of each point.

    Args:
        points: shape (N, d); centred inside, so a common offset costs no precision.
        centroids: shape (K, d).
        max_bytes: bound on the scratch of a chunk.
        weights: positive, shape (N, d) or (N, 1); see :func:`kmeans`.

    Returns:
        Codes, shape (N,), int64. Where the squared distances of a point to two centroids differ by
        less than 2^-13 of them, or by float32's rounding of its own squared length, either may be
        given. Other points have no say.
    """
    if weights is not None and weights.shape[1] == 1:
        weights = None  # one weight for a whole point moves none of its minima
    centre = centroids.float().mean(0)
    centroids = centroids.float() - centre
    columns = _columns(centroids, weights is not None)
    step = chunk_rows(len(centroids), max_bytes)
    codes = torch.empty(len(points), dtype=torch.int64, device=points.device)
    # One scratch for all chunks: freed and asked for anew, with smaller tensors that stay in
    # between, it leaves holes in the heap that no later one fits in, gigabytes of them.
    distances = columns.new_empty(min(step, len(points)), len(centroids))
    for start in range(0, len(points), step):
        chunk = points[start : start + step].float() - centre
        own = None if weights is None else weights[start : start + step].float()
        if own is not None:  # no code changes, and very large or small weights stay in range
            own = own / own.mean(1, keepdim=True)
        codes[start : start + step] = _nearest(chunk, columns, own, distances[: len(chunk)])
    return codes


def nearest_few(
    points: Tensor, centroids: Tensor, count: int, weights: Tensor | None = None
) -> Tensor:
    """The nearest centroids of each point, nearest first: (N, min(count, K)). Not in chunks."""
    columns = _columns(centroids, weights is not None)
    distances = _augmented(points, weights) @ columns
    return distances.topk(min(count, len(centroids)), dim=1, largest=False).indices


def squared_errors(points: Tensor, decoded: Tensor, weights: Tensor | None = None) -> Tensor:
    """(Weighted) squared distance of each point to what stands for it, shape (N,)."""
    squares = (points - decoded).square()
    return (squares if weights is None else weights * squares).sum(1)


def _errors(points: Tensor, centroids: Tensor, codes: Tensor, weights: Tensor | None) -> Tensor:
    return squared_errors(points, centroids[codes], weights)


def _seed_centroids(
    points: Tensor, weights: Tensor | None, n_centroids: int, generator: torch.Generator
) -> Tensor:
    """Greedy k-means++ on a sample: of a few points drawn by their squared distance, the one that
    lowers the sum of squared distances most becomes the next centroid."""
    drawn = draw(len(points), SEEDING_POINTS, generator).to(points.device)
    sample = points[drawn]
    own = sample.new_ones(1, 1) if weights is None else weights[drawn]
    weighted = own * sample
    norms = (weighted * sample).sum(1)
    across = own.expand_as(sample).t()
    first = int(torch.randint(len(sample), (1,), generator=generator))
    centroids = sample[first].expand(n_centroids, -1).clone()
    distances = (own * (sample - centroids[0]).square()).sum(1)
    trials = 2 + int(math.log(n_centroids))
    uniform = torch.rand(n_centroids, trials, generator=generator, dtype=torch.float64)
    uniform = uniform.to(points.device)
    for k in range(1, n_centroids):
        cumulated = distances.double().cumsum(0)
        picks = torch.searchsorted(cumulated, uniform[k] * cumulated[-1], right=True)
        picks = picks.clamp_(max=len(sample) - 1)
        squares = norms[picks][:, None] if weights is None else sample[picks].square() @ across
        new = norms + squares - 2 * (sample[picks] @ weighted.t())
        new = torch.minimum(new.clamp_(min=0), distances)
        best = new.sum(1).argmin()
        centroids[k] = sample[picks[best]]
        distances = new[best]
    return centroids


def draw(n_points: int, n_draws: int, generator: torch.Generator) -> Tensor:
    """Indices of so many points, each at most once; of all in order where there are no more."""
    if n_points <= n_draws:
        return torch.arange(n_points)
    return torch.randperm(n_points, generator=generator)[:n_draws]


def _update(points: Tensor, weights: Tensor | None, codes: Tensor, centroids, generator) -> Tensor:
    """Means of the clusters; empty ones start anew at points drawn by their squared error."""
    n_centroids = len(centroids)
    counts = torch.bincount(codes, minlength=n_centroids)
    means = cluster_means(points, codes, n_centroids, weights)
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        errors = _errors(points, means, codes, weights)
        cumulated = errors.double().cumsum(0)
        if cumulated[-1] > 0:  # else every point stands on its centroid: there is nothing to split
            uniform = torch.rand(len(empty), generator=generator, dtype=torch.float64)
            targets = uniform.to(points.device) * cumulated[-1]
            picks = torch.searchsorted(cumulated, targets, right=True).clamp(max=len(points) - 1)
            means[empty] = points[picks]
        else:
            means[empty] = centroids[empty]
    return means


def cluster_means(
    points: Tensor, codes: Tensor, n_centroids: int, weights: Tensor | None = None
) -> Tensor:
    """(Weighted) mean of each cluster, shape (n_centroids, d), float32; 0 where it is empty."""
    shape = (n_centroids, points.shape[1])
    if weights is None:
        mass = torch.bincount(codes, minlength=n_centroids).clamp(min=1)[:, None]
        return points.new_zeros(shape).index_add_(0, codes, points) / mass
    mass = points.new_zeros(shape).index_add_(0, codes, weights.expand_as(points))
    sums = points.new_zeros(shape).index_add_(0, codes, weights * points)
    return sums / mass.clamp(min=torch.finfo(mass.dtype).tiny)


def _iterate(
    points, weights, centroids, n_iter, generator, max_bytes
) -> tuple[Tensor, Tensor, int]:
    """Lloyd's iterations until the codes stand still: centroids, their codes, iterations."""
    codes = assign(points, centroids, max_bytes, weights)
    for iteration in range(n_iter):
        centroids = _update(points, weights, codes, centroids, generator)
        new_codes = assign(points, centroids, max_bytes, weights)
        if torch.equal(new_codes, codes):
            return centroids, codes, iteration + 1
        codes = new_codes
    return centroids, codes, n_iter


def _check(points: Tensor, weights: Tensor | None, n_centroids: int, init: Tensor | None) -> None:
    if points.dim() != 2 or not len(points):
        raise ValueError(f"points of shape {tuple(points.shape)}: k-means needs (N, d) with N > 0")
    require_finite(points)
    if init is not None and init.shape != (n_centroids, points.shape[1]):
        raise ValueError(
            f"init of shape {tuple(init.shape)} does not fit {n_centroids} centroids of "
            f"{points.shape[1]} numbers"
        )
    if weights is None:
        return
    if tuple(weights.shape) not in (tuple(points.shape), (len(points), 1)):
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} do not fit points of shape "
            f"{tuple(points.shape)}: give one for each number, or one for each point"
        )
    if not (torch.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("weights must be finite and above 0: a point of weight 0 has no centroid")


def objective_of(
    points: Tensor, centroids: Tensor, codes: Tensor, weights: Tensor | None = None
) -> float:
    """(Weighted) sum of squared distances of points to their centroids, summed in float64."""
    total = 0.0
    for start in range(0, len(points), 2**16):
        part = slice(start, start + 2**16)
        own = None if weights is None else weights[part]
        total += float(_errors(points[part], centroids, codes[part], own).double().sum())
    return total


@torch.no_grad()
def kmeans(
    points: Tensor,
    n_centroids: int,
    *,
    n_iter: int = 20,
    seed: int = 0,
    init: Tensor | None = None,
    max_bytes: int = MAX_BYTES,
    sample_size: int = SAMPLE_POINTS,
    weights: Tensor | None = None,
) -> KMeansResult:
    """Learns a codebook: minimises the sum of ||b - c[I]||^2 over all blocks (section 3.2).

    Above ``sample_size`` points a sample is clustered, then all points for three iterations: half
    the time at the same objective. torch's global random state is not touched.

    Args:
        points: blocks, shape (N, d), any float dtype; the work is done in float32.
        n_centroids: K; more than there are distinct points is allowed and gives duplicates.
        n_iter: most iterations.
        seed: seed of the start and of the refilling of empty clusters.
        init: centroids to start from, shape (K, d), in place of k-means++.
        max_bytes: bound on the scratch of a chunk.
        sample_size: see above.
        weights: h above 0, shape (N, d) or (N, 1): the sum is that of h (b - c[I])^2, number by
            number, for the codes as for the centroids. None weighs all alike.

    Raises:
        ValueError: if there are no points, an entry is not finite, or ``init`` or ``weights`` do
            not fit.
    """
    _check(points, weights, n_centroids, init)
    points = points.detach().float()
    if weights is not None:
        weights = weights.detach().float()
    generator = torch.Generator().manual_seed(seed)
    done = 0
    centroids = init.detach().float().clone() if init is not None else None
    if len(points) > sample_size:
        drawn = draw(len(points), sample_size, generator).to(points.device)
        sample, own = points[drawn], None if weights is None else weights[drawn]
        if centroids is None:
            centroids = _seed_centroids(sample, own, n_centroids, generator)
        centroids, _, done = _iterate(sample, own, centroids, n_iter, generator, max_bytes)
        n_iter = min(n_iter, FULL_ITERATIONS)
    elif centroids is None:
        centroids = _seed_centroids(points, weights, n_centroids, generator)
    centroids, codes, full = _iterate(points, weights, centroids, n_iter, generator, max_bytes)
    objective = objective_of(points, centroids, codes, weights)
    return KMeansResult(centroids, codes, objective, done + full)
