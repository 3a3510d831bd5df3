"""k-means with a weight per element, against float64 references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from support.clustering import objective

from hf_quantnoise.quantizers import ProductQuantizer
from hf_quantnoise.quantizers.assignment import assign
from hf_quantnoise.quantizers.kmeans import _pick_by_error, kmeans


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape, seed=9, spread=3.0):
    """Return weights over several orders of magnitude."""
    return (normal(*shape, seed=seed) * spread).exp()


def distances(points, centroids, weights):
    """(N, K): sum_j h_j (x_j - c_j)^2 in float64."""
    differences = points.double()[:, None] - centroids.double()
    return (weights.double()[:, None] * differences.square()).sum(2)


@settings(deadline=None, max_examples=30)
@given(
    k=st.sampled_from([2, 7, 64, 1500]),
    d=st.integers(1, 9),
    offset=st.sampled_from([0.0, -40.0]),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_assign_minimizes_the_weighted_distance(k, d, offset, spread, seed):
    points, centroids = normal(300, d, seed=seed) + offset, normal(k, d, seed=seed + 1) + offset
    weights = uneven(300, d, seed=seed, spread=spread)
    reference = distances(points, centroids, weights)
    codes = assign(points, centroids, weights=weights)
    found = reference.gather(1, codes[:, None])[:, 0]
    best = reference.min(1).values
    lengths = (weights * (points - centroids.mean(0)).square()).sum(1)
    assert (found - best <= 1.01 * 2**-13 * best + 4e-6 * lengths).all()


@pytest.mark.parametrize("k", [256, 1024])
def test_assign_is_exact_beside_heavy_points_and_outliers(k):
    points, weights = normal(4000, 4), uneven(4000, 4, spread=1.0)
    weights[::1000] *= 1e9
    points[1::1000] *= 1000
    centroids = points[torch.randperm(4000, generator=torch.Generator().manual_seed(1))[:k]]
    reference = distances(points, centroids, weights)
    found = reference.gather(1, assign(points, centroids, weights=weights)[:, None])[:, 0]
    best = reference.min(1).values
    light = torch.arange(4000) % 1000 > 1
    assert found[light].sum() <= best[light].sum() * (1 + 1e-5)


@pytest.mark.parametrize("power", [-110, 110])
def test_assign_is_invariant_to_the_scale_of_weights(power):
    points, weights = normal(2000, 4), uneven(2000, 4, spread=1.0)
    codes = assign(points, points[:64], weights=weights)
    assert torch.equal(codes, assign(points, points[:64], weights=weights * 2.0**power))


def test_centroids_are_weighted_means():
    points, weights = normal(3000, 4), uneven(3000, 4, spread=1.0)
    centroids, codes = kmeans(points, 16, weights=weights, n_iter=200)
    for k in range(16):
        x, h = points[codes == k].double(), weights[codes == k].double()
        expected = (h * x).sum(0) / h.sum(0)
        torch.testing.assert_close(centroids[k].double(), expected, rtol=1e-4, atol=1e-4)


def test_weights_per_point_are_as_good_as_scikit_learn():
    points, weights = normal(4000, 4), uneven(4000, 1, spread=1.0)
    reference = sum(
        KMeans(32, n_init=1, max_iter=20, random_state=seed)
        .fit(points.numpy(), sample_weight=weights[:, 0].numpy())
        .inertia_
        for seed in range(4)
    )
    results = [kmeans(points, 32, weights=weights, seed=seed) for seed in range(4)]
    objectives = [objective(points, result, weights) for result in results]
    assert sum(objectives) <= reference * 1.02
    exact = distances(points, results[0][0], weights.expand(-1, 4)).min(1).values.sum()
    assert objectives[0] <= float(exact) * (1 + 1e-3)


def test_equal_weights_match_no_weights():
    points = normal(5000, 4)
    unweighted = objective(points, kmeans(points, 32, n_iter=5))
    for weights in (torch.full((5000, 4), 0.3), torch.full((5000, 1), 0.3)):
        weighted = objective(points, kmeans(points, 32, n_iter=5, weights=weights), weights)
        assert weighted == pytest.approx(0.3 * unweighted, rel=0.02)


def test_sampling_and_iterations_with_weights(monkeypatch):
    points, weights = normal(20_000, 4), uneven(20_000, 4, spread=1.0)

    def fit(**options) -> float:
        return objective(points, kmeans(points, 16, weights=weights, **options), weights)

    objectives = [fit(n_iter=n) for n in (1, 4, 20)]
    assert objectives == sorted(objectives, reverse=True)
    full = sum(fit(seed=seed) for seed in range(4))
    monkeypatch.setattr("hf_quantnoise.quantizers.kmeans.SAMPLE_POINTS", 4096)
    assert sum(fit(seed=seed) for seed in range(4)) <= full * 1.02


def test_points_are_picked_by_error_a_part_at_a_time(monkeypatch):
    """The same points as with the errors of all points at once."""
    points, weights, means = normal(500, 4), uneven(500, 4), normal(16, 4, seed=1)
    codes = (torch.arange(500) % 16).byte()
    uniform = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64)
    errors = (weights * (points - means[codes.long()]).square()).sum(1).double()
    expected = torch.searchsorted(errors.cumsum(0), uniform * errors.sum(), right=True)
    for size in (7, 500, 1000):
        monkeypatch.setattr("hf_quantnoise.quantizers.kmeans.COPIED_POINTS", size)
        assert torch.equal(_pick_by_error(points, weights, codes, means, uniform), expected)
    assert _pick_by_error(means, None, torch.arange(16).byte(), means, uniform) is None


def test_empty_clusters_restart():
    points, weights = normal(4000, 4), uneven(4000, 4)
    start = torch.cat([points[:1], torch.full((31, 4), 1e4)])
    _, codes = kmeans(points, 32, weights=weights, init=start)
    assert (torch.bincount(codes, minlength=32) > 0).all()


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_importance_lowers_the_output_error(bits, dtype):
    """||X (W - W_q)^T||^2 in float64, on inputs of very different second moments."""
    inputs = normal(500, 32, seed=3) * uneven(32, spread=1.5)
    matrix = normal(96, 32).to(dtype)
    importance = inputs.square().sum(0)[None]
    quantizer = ProductQuantizer(block_size=4, n_centroids=16, codebook_bits=bits)
    errors = []
    for weights in (None, importance / importance.mean()):
        state = quantizer.fit(matrix, importance=weights)
        codes = quantizer.encode(matrix, state, weights)
        difference = quantizer.decode(codes, state).double() - matrix.double()
        errors.append(float((inputs.double() @ difference.t()).square().sum()))
    assert errors[1] < 0.5 * errors[0]


def test_importance_per_row_is_a_weight_per_block():
    matrix, rows = normal(96, 32), uneven(96, 1, spread=1.0)
    quantizer = ProductQuantizer(block_size=4, n_centroids=16)
    by_row = quantizer.fit(matrix, importance=rows)["codebook"]
    in_full = quantizer.fit(matrix, importance=rows.expand(96, 32))["codebook"]
    weights = rows.expand(96, 8).reshape(-1, 1).expand(-1, 4)
    errors = [
        float(distances(matrix.reshape(-1, 4), codebook, weights).min(1).values.sum())
        for codebook in (by_row, in_full, quantizer.fit(matrix)["codebook"])
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.02) and errors[0] < 0.95 * errors[2]


def test_invalid_weights_raise():
    with pytest.raises(ValueError, match=r"weights.*\(10, 3\).*\(10, 4\)"):
        kmeans(normal(10, 4), 2, weights=torch.ones(10, 3))
    for bad in (0.0, -1.0, float("nan")):
        weights = torch.ones(10, 4)
        weights[2, 1] = bad
        with pytest.raises(ValueError, match=r"weights.*above 0"):
            kmeans(normal(10, 4), 2, weights=weights)
