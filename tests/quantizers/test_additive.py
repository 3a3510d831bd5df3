"""Additive quantization against float64 references, and against one codebook."""

import json

import pytest
import torch
from torch import nn

from hf_quantnoise import IPQConfig
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.quantizers import (
    AdditiveQuantizer,
    ProductQuantizer,
    additive,
    quantizer_from_dict,
)
from hf_quantnoise.quantizers.additive import BEAM


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(quantizer, codes, state):
    """Return c1[i] + c2[j] in float64."""
    first, second = quantizer.centroids(state).double().split(quantizer.n_centroids)
    pairs = codes.long().view(len(codes), -1, 2)
    return (first[pairs[..., 0]] + second[pairs[..., 1]]).flatten(1)


def error_of(quantizer, matrix, importance=None):
    state = quantizer.fit(matrix, importance=importance)
    codes = quantizer.encode(matrix, state, importance)
    squares = (quantizer.decode(codes, state).double() - matrix.double()).square()
    return float((squares if importance is None else importance * squares).sum())


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_sums_two_centroids(bits, dtype):
    matrix = normal(64, 32).to(dtype)
    quantizer = AdditiveQuantizer(block_size=8, n_centroids=20, codebook_bits=bits)
    state = quantizer.fit(matrix)
    codes = quantizer.encode(matrix, state)
    assert codes.shape == (64, 8) and int(codes.max()) < 20
    spec = quantizer.state_spec(64, 32)
    assert {key: tuple(t.shape) for key, t in state.items()} == {k: s for k, (s, _) in spec.items()}
    decoded = quantizer.decode(codes, state)
    assert decoded.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        decoded.double(), by_hand(quantizer, codes, state), rtol=tolerance, atol=tolerance
    )
    assert quantizer_from_dict(json.loads(json.dumps(quantizer.to_dict()))) == quantizer


def test_codes_match_a_float64_beam_search():
    matrix = normal(32, 32)
    quantizer = AdditiveQuantizer(block_size=8, n_centroids=20)
    state = quantizer.fit(matrix)
    first, second = state["codebook"].double().split(20)
    blocks = matrix.double().view(-1, 8)
    sums = (first[:, None] + second).view(-1, 8)
    all_pairs = torch.cdist(blocks, sums).square().view(-1, 20, 20)
    beam = torch.cdist(blocks, first).topk(BEAM, 1, largest=False).indices
    best = all_pairs.gather(1, beam[..., None].expand(-1, -1, 20)).flatten(1).min(1).values
    errors = (quantizer.quantize(matrix, state).double().view(-1, 8) - blocks).square().sum(1)
    assert (errors - best).max() <= 4e-4 * blocks.square().sum(1).max()
    exact = all_pairs.flatten(1).min(1).values
    assert errors.sum() <= 1.02 * exact.sum()  # the beam against all pairs


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["gaussian", "correlated"])
def test_two_codebooks_beat_one_at_equal_bytes(spread):
    """Blocks of 8 against blocks of 4; 8-bit centroids offset the larger codebooks."""
    matrix = normal(256, 256) + spread * normal(256, 64, seed=1).repeat_interleave(4, 1)
    one = ProductQuantizer(block_size=4, n_centroids=64)
    two = AdditiveQuantizer(block_size=8, n_centroids=63, codebook_bits=8)
    assert two.packed_bytes(256, 256) == one.packed_bytes(256, 256)
    assert error_of(two, matrix) < 0.93 * error_of(one, matrix)


def test_large_weight_is_fitted_on_a_sample(monkeypatch):
    matrix = normal(256, 128)
    quantizer = AdditiveQuantizer(block_size=8, n_centroids=32)
    full = error_of(quantizer, matrix)
    monkeypatch.setattr(additive, "SAMPLE_POINTS", 2048)
    assert error_of(quantizer, matrix) < 1.03 * full


def test_importance_lowers_the_weighted_error():
    matrix, importance = normal(128, 64), normal(1, 64, seed=2).mul(1.5).exp()
    quantizer = AdditiveQuantizer(block_size=8, n_centroids=32)
    state = quantizer.fit(matrix)
    squares = (quantizer.quantize(matrix, state) - matrix).double().square()
    unweighted = float((importance * squares).sum())
    assert error_of(quantizer, matrix, importance) < 0.8 * unweighted
    rows = normal(128, 1, seed=3).mul(1.5).exp()
    assert error_of(quantizer, matrix, rows) < 0.8 * float((rows * squares).sum())


def test_gradient_of_a_centroid_is_the_mean_of_its_blocks():
    layer = nn.Linear(32, 48, bias=False)
    layer.weight.data = normal(48, 32)
    pack_layer(layer, AdditiveQuantizer(block_size=8, n_centroids=8))
    upstream = normal(48, 32, seed=5)
    (layer.weight * upstream).sum().backward()
    blocks, pairs = upstream.view(-1, 8).double(), layer.codes().view(-1, 2)
    expected = [blocks[pairs[:, book] == k] for book in (0, 1) for k in range(8)]
    expected = torch.stack([b.mean(0) if len(b) else torch.zeros(8).double() for b in expected])
    torch.testing.assert_close(layer.weight_codebook.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_check_and_config_errors():
    quantizer = AdditiveQuantizer(block_size=8, n_centroids=16)
    assert "only 32 blocks for 32 centroids" in quantizer.check(8, 32)
    with pytest.raises(ValueError, match=r"n_codebooks.*3"):
        IPQConfig(n_codebooks=3)


def test_nan_raises_with_given_codebooks():
    quantizer, matrix = AdditiveQuantizer(block_size=4, n_centroids=4), torch.randn(64, 16)
    start = quantizer.fit(matrix)
    matrix[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"invalid weight: 1 of 1024 entries"):
        quantizer.fit(matrix, init=start)
