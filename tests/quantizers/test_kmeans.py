"""k-means against scikit-learn and a float64 search, and its edge cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from support.clustering import objective
from support.memory import growth_of_process

from hf_quantnoise.quantizers.assignment import MAX_BYTES, assign, chunk_rows
from hf_quantnoise.quantizers.kmeans import kmeans, sample_indices


def points_of(count, d, seed=0):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed))


def exact(points, centroids):
    """Return the squared distance of each point to its nearest centroid, in float64."""
    return torch.cdist(points.double(), centroids.double()).square().min(1).values


def test_codes_match_a_float64_search():
    points = points_of(5000, 4)
    centroids, codes = kmeans(points, 64)
    best = exact(points, centroids).sum().item()
    assert objective(points, (centroids, codes)) <= best * (1 + 1e-3)


@pytest.mark.parametrize(("count", "d", "k"), [(4000, 4, 64), (6000, 8, 256), (12_000, 4, 300)])
def test_kmeans_is_as_good_as_scikit_learn(count, d, k):
    """Averaged over seeds, because single local minima differ by 1%."""
    points = points_of(count, d)
    reference = sum(
        KMeans(k, n_init=1, max_iter=20, random_state=seed).fit(points.numpy()).inertia_
        for seed in range(3)
    )
    found = sum(objective(points, kmeans(points, k, seed=seed)) for seed in range(3))
    assert found <= reference * 1.01


@settings(deadline=None, max_examples=30)
@given(
    k=st.sampled_from([1, 2, 17, 256, 300, 1024, 1100]),
    d=st.integers(1, 12),
    offset=st.sampled_from([0.0, 3.0, -40.0]),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_assign_finds_the_nearest_centroid(k, d, offset, scale, seed):
    """Within the rounding of the packed distance, and of the point's squared norm in float32."""
    points = points_of(500, d, seed) * scale + offset * scale
    points[::50] += 1e3 * scale  # outliers must not cost the others precision
    centroids = points_of(k, d, seed + 1) * scale + offset * scale
    codes = assign(points, centroids)
    errors = (points.double() - centroids.double()[codes]).square().sum(1)
    best = exact(points, centroids)
    centred = points.double() - centroids.double().mean(0)
    # The mean is subtracted in float32, with an error in proportion to the common offset.
    rounding = 2e-6 * centred.square().sum(1) + 4e-7 * scale * abs(offset) * centred.norm(dim=1)
    assert (errors - best <= 1.01 * 2**-13 * best + rounding).all()


def with_outliers(k, times, count=20_000):
    """Return blocks of 4, every 1,000th scaled, and k of them as centroids."""
    points = points_of(count, 4)
    points[::1000] *= times
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return points, points[order[:k]].clone()


@pytest.mark.parametrize("times", [1, 30, 1000])
@pytest.mark.parametrize("k", [256, 1024])
def test_assign_is_exact_beside_outliers(k, times):
    points, centroids = with_outliers(k, times)
    errors = (points.double() - centroids.double()[assign(points, centroids)]).square().sum(1)
    ordinary = points.norm(dim=1) < 10
    for chosen in (ordinary, ~ordinary):
        assert errors[chosen].sum() <= exact(points[chosen], centroids).sum() * (1 + 1e-5)


@pytest.mark.parametrize("k", [16, 256, 1024, 2048])
@pytest.mark.parametrize("weighted", [False, True])
def test_assign_treats_points_independently(k, weighted, monkeypatch):
    """With integer values sums are exact in any order, so codes must be equal for any chunk size
    and any other points."""
    points = (points_of(3000, 4) * 4).round()
    centroids = (points_of(k, 4, 1) * 4).round()
    centroids[-1] -= centroids.sum(0) - (centroids.sum(0) / k).round() * k  # a full mean
    weights = points_of(3000, 4, 2).abs().ceil() if weighted else None
    if weighted:
        weights[:, 3] = 8 - weights[:, :3].clamp_(max=2).sum(1)  # of mean 2
    codes = assign(points, centroids, weights=weights)
    with monkeypatch.context() as patch:
        patch.setattr("hf_quantnoise.quantizers.assignment.MAX_BYTES", 4 * k * 7)
        assert torch.equal(codes, assign(points, centroids, weights=weights))
    alone = slice(1, 2000, 3)
    points[::3] *= 1024
    weights_alone = None if weights is None else weights[alone]
    assert torch.equal(assign(points, centroids, weights=weights)[alone], codes[alone])
    assert torch.equal(assign(points[alone], centroids, weights=weights_alone), codes[alone])


def test_kmeans_finds_planted_clusters():
    centres = points_of(40, 6, 1) * 50
    points = centres.repeat(50, 1) + points_of(2000, 6, 2) * 0.01
    found, _ = kmeans(points, 40)
    assert torch.cdist(centres, found).min(1).values.max() < 0.1


def test_seed_reproduces_and_global_generator_is_unchanged():
    points = points_of(3000, 4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = kmeans(points, 32, seed=1), kmeans(points, 32, seed=1), kmeans(points, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_no_empty_cluster_with_90_percent_zero_blocks():
    points = points_of(5000, 4)
    points[500:] = 0
    centroids, codes = kmeans(points, 64)
    assert (torch.bincount(codes, minlength=64) > 0).all()
    assert objective(points, (centroids, codes)) < points.square().sum() * 0.2


def test_fewer_distinct_points_than_centroids():
    points = points_of(5, 4).repeat(20, 1)
    centroids, codes = kmeans(points, 16)
    assert objective(points, (centroids, codes)) == pytest.approx(0, abs=1e-8)
    assert centroids.shape == (16, 4) and torch.isfinite(centroids).all()
    constant = torch.full((50, 4), 0.3)
    assert objective(constant, kmeans(constant, 8)) == pytest.approx(0, abs=1e-8)
    assert objective(torch.zeros(3, 2), kmeans(torch.zeros(3, 2), 4)) == 0


@pytest.mark.parametrize("most", [10_000, 100])  # with a permutation, and without
def test_samples_are_distinct_and_uniform(most, monkeypatch):
    monkeypatch.setattr("hf_quantnoise.quantizers.kmeans.MAX_PERMUTED", most)
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack([sample_indices(6500, 100, generator) for _ in range(2000)])
    assert samples.min() >= 0 and samples.max() < 6500
    assert all(len(sample.unique()) == 100 for sample in samples[:100])
    counts = torch.bincount(samples.flatten() // 65, minlength=100)  # 2,000 each, +- 44
    assert (counts - 2000).abs().max() < 5 * 45
    assert abs(float(samples[:, :50].double().mean()) / 3249.5 - 1) < 0.01, "no order"


def test_sampling_keeps_the_objective(monkeypatch):
    """With 256 points per centroid in the sample, as in real use; averaged over seeds, because
    single local minima differ by 1%."""
    points = points_of(20_000, 4)
    full = sum(objective(points, kmeans(points, 16, seed=seed)) for seed in range(5))
    monkeypatch.setattr("hf_quantnoise.quantizers.kmeans.SAMPLE_POINTS", 4096)
    sampled = sum(objective(points, kmeans(points, 16, seed=seed)) for seed in range(5))
    assert sampled <= full * 1.015  # iterations on all points end while codes still change
    assert len(kmeans(points, 16)[1]) == len(points)


def test_init_continues_from_centroids():
    points = points_of(4000, 4)
    cold = kmeans(points, 64, n_iter=30)
    moved = points + 1e-4
    warm = kmeans(moved, 64, n_iter=2, init=cold[0])
    assert objective(moved, warm) <= objective(points, cold) * 1.001


def test_more_iterations_lower_the_objective():
    points = points_of(4000, 4)
    objectives = [objective(points, kmeans(points, 64, n_iter=n)) for n in (1, 3, 10, 30)]
    assert objectives == sorted(objectives, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_points_are_computed_in_float32(dtype):
    points = points_of(2000, 4).to(dtype)
    fitted, in_float32 = kmeans(points, 32), kmeans(points.float(), 32)
    assert fitted[0].dtype == torch.float32
    assert objective(points, fitted) == pytest.approx(objective(points, in_float32))


def test_chunk_rows_bounds_the_memory(monkeypatch):
    for k in (2, 16, 256, 4096, 65536):
        rows = chunk_rows(k)
        assert rows >= 1 and rows * k * 4 <= max(MAX_BYTES, 4 * k)
    assert chunk_rows(256) >= 1024
    monkeypatch.setattr("hf_quantnoise.quantizers.assignment.MAX_BYTES", 4096)
    assert chunk_rows(256) == 4


@pytest.mark.parametrize(("k", "count"), [(256, 800_000), (1024, 300_000)])
def test_assign_does_not_fragment_the_heap(k, count):
    """Scratch memory allocated per chunk would leave up to a gigabyte of them."""
    before = f"""
import torch
from hf_quantnoise.quantizers.assignment import assign
points, centroids = torch.randn({count}, 4), torch.randn({k}, 4)
assign(points[:2000], centroids)
"""
    codes = 8 * count
    assert growth_of_process(before, "assign(points, centroids)") < codes + 4 * MAX_BYTES


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_raise(bad):
    points = points_of(100, 4)
    points[3, 1] = bad
    with pytest.raises(ValueError, match="1 of 400 entries are NaN"):
        kmeans(points, 4)


def test_invalid_shapes_raise():
    with pytest.raises(ValueError, match=r"points.*\(0, 4\)"):
        kmeans(torch.zeros(0, 4), 4)
    with pytest.raises(ValueError, match=r"init.*\(3, 4\).*\(4, 4\)"):
        kmeans(points_of(10, 4), 4, init=torch.zeros(3, 4))
