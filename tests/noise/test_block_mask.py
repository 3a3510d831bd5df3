"""J: its share, its ways of being drawn, and one J for tied layers."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quantnoise.noise.block_mask import (
    FEW_BLOCKS,
    MASK_ABOVE,
    BlockMask,
    SharedMaskSampler,
    draw,
)

CPU = torch.device("cpu")


def selections(count: int = 40) -> dict[str, BlockMask]:
    chosen = torch.tensor([3, 0, 39, 3, 17])
    mask = torch.zeros(count, dtype=torch.bool)
    mask[chosen] = True
    return {
        "indices": BlockMask(count, indices=chosen),
        "mask": BlockMask(count, mask=mask),
        "everything": BlockMask(count),
    }


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 20_000),
    p=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**31),
)
def test_the_share_is_p_within_binomial_bounds(count, p, seed):
    torch.manual_seed(seed)
    repeats = max(4, min(2000, 20_000 // count))
    hits = sum(int(draw(count, p, CPU).as_mask().sum()) for _ in range(repeats))
    trials = repeats * count
    deviation = math.sqrt(p * (1 - p) / trials)
    # Six standard deviations, and what a 16-bit threshold or a whole number of draws can miss.
    assert abs(hits / trials - p) <= 6 * deviation + 1 / 65536 + 0.5 / count * (p * count >= 64)


@pytest.mark.parametrize("count", [1, 2, 5, 24])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_small_layers_are_not_biased(count, p):
    torch.manual_seed(0)
    repeats = 10_000 // count
    hits = sum(int(draw(count, p, CPU).as_mask().sum()) for _ in range(repeats))
    trials = repeats * count
    assert abs(hits / trials - p) < 5 * math.sqrt(p * (1 - p) / trials)


@pytest.mark.parametrize("p", [0.02, 0.29, 0.31, 0.999])
def test_every_block_is_as_likely_as_another(p):
    """fairseq's share is right too; but a block's own chance must be p wherever it stands."""
    torch.manual_seed(1)
    count, repeats = 4000, 600
    hits = torch.zeros(count)
    for _ in range(repeats):
        hits += draw(count, p, CPU).as_mask()
    deviation = math.sqrt(p * (1 - p) / repeats)
    assert (hits / repeats - p).abs().max() < 6 * deviation
    assert (hits / repeats).std() == pytest.approx(deviation, rel=0.15)


def test_each_rate_is_drawn_its_own_way():
    many = 10 * FEW_BLOCKS
    assert draw(many * 10, 0.1, CPU).indices is not None
    assert draw(many, MASK_ABOVE + 0.01, CPU).mask is not None
    assert draw(FEW_BLOCKS - 1, 0.9, CPU).mask is not None


def test_p_1_draws_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert draw(100, 1.0, CPU).everything
    assert SharedMaskSampler(2).draw(0, [(100, 1.0)], CPU)[0].everything
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("way", ["indices", "mask", "everything"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_only_chosen_blocks_change_and_the_rest_is_bit_equal(way, block_size):
    selection = selections()[way]
    blocks, new = torch.randn(40, block_size), torch.randn(40, block_size)
    chosen = selection.as_mask()
    zeroed, replaced = blocks.clone(), blocks.clone()
    selection.zero(zeroed)
    selection.replace(replaced, lambda indices: new if indices is None else new[indices])
    assert (zeroed[chosen] == 0).all() and torch.equal(zeroed[~chosen], blocks[~chosen])
    assert torch.equal(replaced[chosen], new[chosen])
    assert torch.equal(replaced[~chosen], blocks[~chosen])


@pytest.mark.parametrize("way", ["indices", "mask", "everything"])
def test_the_part_of_j_on_some_rows(way):
    selection = selections()[way]
    rows = torch.tensor([9, 0, 0, 4])
    expected = selection.as_mask().view(10, 4)[rows].reshape(-1)
    part = selection.of_rows(rows, 4)
    assert part.count == 16
    assert torch.equal(part.as_mask(), expected)


SIZES = [(5000, 0.1), (777, 0.5)]


def masks(shared: SharedMaskSampler, member: int) -> torch.Tensor:
    return torch.cat([selection.as_mask() for selection in shared.draw(member, SIZES, CPU)])


def test_tied_layers_see_one_j_per_forward():
    torch.manual_seed(0)
    shared = SharedMaskSampler(3)
    first = [masks(shared, member) for member in (0, 1, 2)]
    second = [masks(shared, member) for member in (2, 0)]
    third = [masks(shared, member) for member in (2, 1)]  # layer 2 again: a new forward
    for forward in (first, second, third):
        assert all(torch.equal(mask, forward[0]) for mask in forward)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(second[0], third[0])


def test_a_copy_draws_for_itself():
    shared = SharedMaskSampler(2)
    masks(shared, 0)
    other = copy.deepcopy(shared)
    assert other._cached is None
    assert torch.equal(masks(shared, 1), masks(other, 1))
    torch.manual_seed(3)
    mine = masks(shared, 0)
    torch.manual_seed(4)
    assert not torch.equal(masks(other, 0), mine)


def test_recomputed_layers_see_their_own_j_in_any_order():
    """Gradient checkpointing recomputes the last layer first, with the generator set back."""
    shared = SharedMaskSampler(2)
    seen: dict[tuple[int, int], torch.Tensor] = {}
    states = {}
    torch.manual_seed(0)
    for forward in range(2):  # two forwards before one backward
        for member in range(2):
            states[forward, member] = torch.get_rng_state()
            seen[forward, member] = masks(shared, member)
            torch.rand(5)  # dropout of the layer
    again = {}

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            for key in [(0, 1), (1, 1), (1, 0), (0, 0)]:
                torch.set_rng_state(states[key])
                again[key] = masks(shared, key[1])
            return gradient

    after = torch.get_rng_state()
    Recompute.apply(torch.zeros(1, requires_grad=True)).backward()
    torch.set_rng_state(after)
    for key, mask in seen.items():
        assert torch.equal(again[key], mask), key
    fresh = masks(shared, 0)
    assert not any(torch.equal(fresh, mask) for mask in seen.values())
    assert torch.equal(masks(shared, 1), fresh)
