"""The knapsack against exhaustive search, and the errors of candidates against full fits."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_quantnoise import IPQConfig
from hf_quantnoise.compression.bit_allocation.candidates import candidates_for
from hf_quantnoise.compression.bit_allocation.knapsack import Option, allocate_bytes
from hf_quantnoise.quantizers import quantizer_from_dict
from hf_quantnoise.structure import find_layers

OPTION = st.builds(Option, st.integers(1, 40), st.floats(0, 10))
WEIGHTS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def total(options, indices):
    chosen = [choices[index] for choices, index in zip(options, indices, strict=True)]
    return sum(one.bytes for one in chosen), sum(one.cost for one in chosen)


@settings(deadline=None, max_examples=200)
@given(WEIGHTS, st.integers(0, 150))
def test_allocate_bytes_is_within_budget_and_near_optimal(options, budget):
    bytes_, cost = total(options, allocate_bytes(options, budget))
    least = sum(min(choices).bytes for choices in options)
    if budget < least:
        assert bytes_ == least
        return
    assert bytes_ <= budget
    ways = itertools.product(*(range(len(choices)) for choices in options))
    within = [total(options, way) for way in ways]
    best = min(cost for size, cost in within if size <= budget)
    # Steps along the hulls are optimal, except for the first one that no longer fits.
    largest = max(max(o.cost for o in each) - min(o.cost for o in each) for each in options)
    assert cost <= best + largest + 1e-9


@settings(deadline=None, max_examples=50)
@given(WEIGHTS)
def test_allocate_bytes_with_a_large_budget_takes_the_cheapest(options):
    _, cost = total(options, allocate_bytes(options, 10**6))
    assert cost == pytest.approx(sum(min(each.cost for each in choices) for choices in options))


class OneLayer(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = nn.Parameter(weight)


def candidates_of(weight):
    (layer,) = find_layers(OneLayer(weight))
    return candidates_for((layer,), IPQConfig(stages=["head"], codebook_bits=32))


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails"])
def test_candidate_errors_match_a_full_fit(kind):
    """Both for K that were fitted to the sample and for interpolated K."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(768, 192, generator=generator)
    if kind == "heavy tails":
        weight = weight * torch.randn(768, 192, generator=generator).abs()
    found = {candidate.short_name: candidate for candidate in candidates_of(weight).candidates}
    for name in ("pq 32x2", "pq 128x4", "pq 512x6", "pq 64x16", "int3 channel", "int8", "int6"):
        quantizer = quantizer_from_dict(found[name].settings)
        decoded = quantizer.quantize(weight, quantizer.fit(weight))
        error = float((weight - decoded).square().sum() / weight.square().sum())
        assert found[name].error == pytest.approx(error, rel=0.15), name


def test_candidate_bytes_grow_as_errors_fall():
    torch.manual_seed(0)
    found = candidates_of(torch.randn(512, 128))
    assert found.candidates[0].settings == {"scheme": "dense"}
    assert found.candidates[0].error == 0
    for size in (2, 4, 8, 16):
        curve = [c for c in found.candidates if c.settings.get("block_size") == size]
        assert len(curve) >= 3
        assert [c.bytes for c in curve] == sorted(c.bytes for c in curve)
        errors = [c.error for c in curve]
        assert errors == sorted(errors, reverse=True)
    names = {c.short_name for c in found.candidates}
    assert "int2 channel" in names and "pq 16x3" not in names  # 3 does not divide 128
    assert all(c.bytes < found.candidates[0].bytes for c in found.candidates[1:])


def test_zero_weight_has_no_error():
    found = candidates_of(torch.zeros(64, 64))
    for candidate in found.candidates:
        assert candidate.error < (1e-6 if candidate.settings["scheme"] == "pq" else 1e-9)
