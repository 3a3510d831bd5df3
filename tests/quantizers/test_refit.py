"""Refits from the last codes: near a fit from scratch after training, in a few Lloyd steps."""

import pytest
import torch

from hf_quantnoise.quantizers import AdditiveQuantizer, ProductQuantizer, RowGroupQuantizer
from hf_quantnoise.quantizers import refit as module
from hf_quantnoise.quantizers.refit import follow, refit

QUANTIZERS = {
    "pq": ProductQuantizer(block_size=8, n_centroids=64),
    "pq int8": ProductQuantizer(block_size=8, n_centroids=64, codebook_bits=8),
    "pq row scale": ProductQuantizer(8, 64, codebook_bits=16, row_scale=True),
    "additive": AdditiveQuantizer(block_size=8, n_centroids=16),
    "row groups": RowGroupQuantizer(
        group_rows=(64, 192), block_sizes=(4, 8), n_centroids=64, row_scale=True
    ),
}


def weight() -> torch.Tensor:
    """Return a matrix with heavy tails and rows of different norms."""
    torch.manual_seed(0)
    values = torch.distributions.StudentT(5.0).sample((256, 128))
    return 0.05 * values * torch.rand(256, 1).add(0.5)


def fitted(quantizer, matrix, seed=0):
    state = quantizer.fit(matrix, seed=seed)
    return state, quantizer.encode(matrix, state)


def error(quantizer, matrix, state, codes) -> float:
    return float((quantizer.decode(codes, state).double() - matrix.double()).square().sum())


@pytest.mark.parametrize(("drift", "steps"), [(0.02, 2), (0.1, 4), (1.0, 20)])
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_follow_is_near_a_fit_from_scratch(quantizer, drift, steps, monkeypatch):
    """The weights move by a share of their standard deviation, 0.1 as in an epoch of training."""
    matrix, calls = weight(), []
    state, codes = fitted(quantizer, matrix)
    changed = matrix + drift * matrix.std() * torch.randn_like(matrix)
    from_scratch = error(quantizer, changed, *fitted(quantizer, changed, seed=1))

    def counted(*args):
        calls.append(args[0] is quantizer)
        return refit(*args)

    monkeypatch.setattr(module, "refit", counted)
    state, codes = follow(quantizer, changed, codes, state, seed=0)
    tolerance = 1.01 if drift <= 0.1 else 1.06
    assert error(quantizer, changed, state, codes) <= tolerance * from_scratch
    assert sum(calls) <= steps
    assert torch.equal(codes, quantizer.encode(changed, state))


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_follow_keeps_the_error_of_unchanged_weights(quantizer):
    matrix = weight()
    before = fitted(quantizer, matrix)
    after = follow(quantizer, matrix, before[1], before[0], seed=0)
    assert before[0].keys() == after[0].keys()
    # Rounding of centroids to 8 bits and scales to float16 is not part of the steps.
    assert error(quantizer, matrix, *after) <= 1.001 * error(quantizer, matrix, *before)


def test_refit_takes_the_means_of_clusters():
    quantizer, matrix = QUANTIZERS["pq"], weight()
    state, codes = fitted(quantizer, matrix)
    changed = matrix + 0.1 * matrix.std() * torch.randn_like(matrix)
    found = refit(quantizer, changed, codes, state, seed=0)["codebook"]
    blocks, of_blocks = changed.double().view(-1, 8), codes.view(-1)
    for centroid in range(64):
        mean = blocks[of_blocks == centroid].mean(0)
        torch.testing.assert_close(found[centroid].double(), mean, atol=1e-7, rtol=1e-5)


def test_refit_restarts_centroids_without_blocks_by_seed():
    quantizer, matrix = QUANTIZERS["pq"], weight()
    state, codes = fitted(quantizer, matrix)
    codes[codes == 3] = 4
    first, again, other = (refit(quantizer, matrix, codes, state, seed) for seed in (0, 0, 1))
    assert torch.equal(first["codebook"], again["codebook"])
    different = (first["codebook"] != other["codebook"]).any(1).nonzero().view(-1)
    assert different.tolist() == [3]
    assert (matrix.view(-1, 8) == first["codebook"][3]).all(1).any()


@pytest.mark.parametrize("drift", [0.0, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_follow_is_no_worse_than_the_last_centroids(quantizer, drift):
    matrix = weight()
    state, codes = fitted(quantizer, matrix)
    changed = matrix + drift * matrix.std() * torch.randn_like(matrix)
    kept = error(quantizer, changed, state, quantizer.encode(changed, state))
    after, again = (follow(quantizer, changed, codes, state, seed=0) for _ in range(2))
    # Centroids are rounded to 8 bits after the steps.
    assert error(quantizer, changed, *after) <= 1.001 * kept
    assert torch.equal(after[1], again[1])
    assert all(torch.equal(after[0][key], again[0][key]) for key in after[0])
