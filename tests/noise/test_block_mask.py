"""J: its share, the methods of sampling it, and one J for tied layers."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quantnoise.noise.block_mask import (
    MAX_INDEX_RATE,
    MIN_EXPECTED_BLOCKS,
    BlockMask,
    SharedMaskSampler,
    sample_mask,
)

CPU = torch.device("cpu")


def example_masks(count: int = 40) -> dict[str, BlockMask]:
    chosen = torch.tensor([3, 0, 39, 3, 17])
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen] = True
    return {
        "indices": BlockMask(count, indices=chosen),
        "mask": BlockMask(count, mask=mask),
        "full": BlockMask(count),
    }


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 20_000),
    p=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**31),
)
def test_sample_mask_share_is_p(count, p, seed):
    torch.manual_seed(seed)
    repeats = max(4, min(2000, 20_000 // count))
    hits = sum(int(sample_mask(count, p, CPU).as_mask().sum()) for _ in range(repeats))
    trials = repeats * count
    deviation = math.sqrt(p * (1 - p) / trials)
    # Six standard deviations, plus the rounding of a 16-bit threshold or of the index count.
    assert abs(hits / trials - p) <= 6 * deviation + 1 / 65536 + 0.5 / count * (p * count >= 64)


@pytest.mark.parametrize("count", [1, 2, 5, 24])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_sample_mask_is_unbiased_for_few_blocks(count, p):
    torch.manual_seed(0)
    repeats = 10_000 // count
    hits = sum(int(sample_mask(count, p, CPU).as_mask().sum()) for _ in range(repeats))
    trials = repeats * count
    assert abs(hits / trials - p) < 5 * math.sqrt(p * (1 - p) / trials)


@pytest.mark.parametrize("p", [0.02, 0.29, 0.31, 0.999])
def test_sample_mask_treats_all_blocks_alike(p):
    """The probability of each block must be p, wherever it is, and not only the total share."""
    torch.manual_seed(1)
    count, repeats = 4000, 600
    hits = torch.zeros(count)
    for _ in range(repeats):
        hits += sample_mask(count, p, CPU).as_mask()
    deviation = math.sqrt(p * (1 - p) / repeats)
    assert (hits / repeats - p).abs().max() < 6 * deviation
    assert (hits / repeats).std() == pytest.approx(deviation, rel=0.15)


def test_sample_mask_method_depends_on_the_rate():
    many = 10 * MIN_EXPECTED_BLOCKS
    assert sample_mask(many * 10, 0.1, CPU).indices is not None
    assert sample_mask(many, MAX_INDEX_RATE + 0.01, CPU).mask is not None
    assert sample_mask(MIN_EXPECTED_BLOCKS - 1, 0.9, CPU).mask is not None


def test_p_1_uses_no_random_values():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert sample_mask(100, 1.0, CPU).is_full
    assert SharedMaskSampler(2).sample_masks(0, [(100, 1.0)], CPU)[0].is_full
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["indices", "mask", "full"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_zero_and_replace_change_chosen_blocks_only(method, block_size):
    block_mask = example_masks()[method]
    blocks, new = torch.randn(40, block_size), torch.randn(40, block_size)
    chosen = block_mask.as_mask()
    zeroed, replaced = blocks.clone(), blocks.clone()
    block_mask.zero(zeroed)
    block_mask.replace(replaced, lambda indices: new if indices is None else new[indices])
    assert (zeroed[chosen] == 0).all() and torch.equal(zeroed[~chosen], blocks[~chosen])
    assert torch.equal(replaced[chosen], new[chosen])
    assert torch.equal(replaced[~chosen], blocks[~chosen])


@pytest.mark.parametrize("method", ["indices", "mask", "full"])
def test_select_rows_matches_the_full_mask(method):
    block_mask = example_masks()[method]
    rows = torch.tensor([9, 0, 0, 4])
    expected = block_mask.as_mask().view(10, 4)[rows].reshape(-1)
    part = block_mask.select_rows(rows, 4)
    assert part.count == 16
    assert torch.equal(part.as_mask(), expected)


SIZES = [(5000, 0.1), (777, 0.5)]


def masks(sampler: SharedMaskSampler, member: int) -> torch.Tensor:
    return torch.cat(
        [block_mask.as_mask() for block_mask in sampler.sample_masks(member, SIZES, CPU)]
    )


def test_shared_sampler_gives_one_mask_per_forward():
    torch.manual_seed(0)
    sampler = SharedMaskSampler(3)
    first = [masks(sampler, member) for member in (0, 1, 2)]
    second = [masks(sampler, member) for member in (2, 0)]
    third = [masks(sampler, member) for member in (2, 1)]  # layer 2 again, so a new forward
    for forward in (first, second, third):
        assert all(torch.equal(mask, forward[0]) for mask in forward)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(second[0], third[0])


def test_shared_sampler_copies_are_independent():
    sampler = SharedMaskSampler(2)
    masks(sampler, 0)
    other = copy.deepcopy(sampler)
    assert torch.equal(masks(sampler, 1), masks(other, 1))
    torch.manual_seed(3)
    original_mask = masks(sampler, 0)
    torch.manual_seed(4)
    assert not torch.equal(masks(other, 0), original_mask)


def test_shared_sampler_recomputes_in_any_order():
    """Gradient checkpointing recomputes the last layer first, with the generator restored."""
    sampler = SharedMaskSampler(2)
    seen: dict[tuple[int, int], torch.Tensor] = {}
    states = {}
    torch.manual_seed(0)
    for forward in range(2):  # two forwards before one backward
        for member in range(2):
            states[forward, member] = torch.get_rng_state()
            seen[forward, member] = masks(sampler, member)
            torch.rand(5)  # dropout of the layer
    recomputed = {}

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            for key in [(0, 1), (1, 1), (1, 0), (0, 0)]:
                torch.set_rng_state(states[key])
                recomputed[key] = masks(sampler, key[1])
            return gradient

    after = torch.get_rng_state()
    Recompute.apply(torch.zeros(1, requires_grad=True)).backward()
    torch.set_rng_state(after)
    for key, mask in seen.items():
        assert torch.equal(recomputed[key], mask), key
    fresh = masks(sampler, 0)
    assert not any(torch.equal(fresh, mask) for mask in seen.values())
    assert torch.equal(masks(sampler, 1), fresh)
