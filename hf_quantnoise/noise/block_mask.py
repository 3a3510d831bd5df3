"""J, the random subset of blocks that get noise in one forward (Eq. 6).

Sampling dominates the cost of noise, so each rate uses the cheapest method: a list of random
indices for small rates, a mask from 16-bit random words for large ones. Samples come from torch's
global generator inside the layer's forward. A seed therefore reproduces them, and gradient
checkpointing, which restores that generator, recomputes with the same J.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compat import in_backward

# Above this rate a mask is cheaper than a list of indices.
MAX_INDEX_RATE = 0.3
# With fewer expected blocks, rounding the number of indices would bias the share noticeably.
MIN_EXPECTED_BLOCKS = 64
# Number of past forwards of a tied weight that can still be recomputed.
MAX_REMEMBERED_SEEDS = 4096


@dataclass(frozen=True)
class BlockMask:
    """J, a subset of ``count`` blocks in row-major order: all, if indices and mask are None."""

    count: int
    indices: Tensor | None = None  # shape (k,), int64, possibly with duplicates
    mask: Tensor | None = None  # True for the chosen blocks, shape (count,)

    @property
    def is_full(self) -> bool:
        """Whether J holds every block (p = 1, QAT)."""
        return self.indices is None and self.mask is None

    def as_mask(self) -> Tensor:
        """Return a boolean tensor of shape (count,), True for the chosen blocks."""
        if self.mask is not None:
            return self.mask
        if self.indices is None:
            return torch.ones(self.count, dtype=torch.bool, device="cpu")
        mask = torch.zeros(self.count, dtype=torch.bool, device=self.indices.device)
        return mask.index_fill_(0, self.indices, True)

    def select_rows(self, rows: Tensor, blocks_per_row: int) -> BlockMask:
        """Return J over the blocks of some rows; rows, shape (n,), may repeat."""
        count = rows.numel() * blocks_per_row
        if self.is_full:
            return BlockMask(count)
        return BlockMask(count, mask=self.as_mask().view(-1, blocks_per_row)[rows].reshape(-1))

    def expand_clusters(self, codes: Tensor) -> BlockMask:
        """Turn J over clusters into J over blocks; codes hold the cluster of each block."""
        if self.is_full:
            return BlockMask(codes.numel())
        mask = self.as_mask().to(codes.device)
        return BlockMask(codes.numel(), mask=mask[codes.reshape(-1).int()])

    def join_blocks(self, groups: Tensor, ratios: Sequence[int]) -> BlockMask:
        """Turn J over equal blocks into J over the larger ones that groups of rows have.

        A block of ``ratios[g]`` blocks, in a row of group g, is in J if the first of them is.

        Args:
            groups: the group of each row, shape (n,).
            ratios: for each group.
        """
        if self.is_full:
            return self
        mask = joined = self.as_mask().view(len(groups), -1)
        for group, ratio in enumerate(ratios):
            if ratio > 1:
                blocks = mask[:, ::ratio].repeat_interleave(ratio, 1)
                joined = torch.where((groups == group)[:, None], blocks, joined)
        return BlockMask(self.count, mask=joined.reshape(-1))

    def zero(self, blocks: Tensor) -> None:
        """Zero the chosen blocks in place; blocks: (count, block size), contiguous."""
        if self.indices is not None:
            blocks.index_fill_(0, self.indices, 0.0)
        elif self.mask is not None:
            blocks.mul_(~self.mask[:, None])  # masked_fill_ branches: up to five times slower
        else:
            blocks.zero_()

    def replace(self, blocks: Tensor, new_values: Callable[[Tensor | None], Tensor]) -> None:
        """Replace the chosen blocks in place; blocks: (count, block size), contiguous.

        ``new_values`` maps k indices to the new blocks, (k, block size), and None to those of all.
        """
        new = new_values(self.indices).to(blocks.dtype)
        if self.indices is not None and blocks.shape[1] == 1:
            blocks.view(-1).scatter_(0, self.indices, new.reshape(-1))
        elif self.indices is not None:
            blocks.index_copy_(0, self.indices, new)
        elif self.mask is not None:
            # Exact for weights 0 and 1, and without the branches of torch.where.
            blocks.lerp_(new.view(blocks.shape), self.mask[:, None].to(blocks.dtype))
        else:
            blocks.copy_(new.view(blocks.shape))


def sample_mask(
    count: int, p: float, device: torch.device, generator: torch.Generator | None = None
) -> BlockMask:
    """Sample J: each of ``count`` blocks with probability ``p``, 0 < p <= 1.

    The share is unbiased at any size. Indices are sampled with replacement, in a fixed number
    chosen so that the expected share is p; this is used only where rounding that number does not
    show. p = 1 uses no random values. Without a generator, torch's global one is used.
    """
    if p >= 1.0:
        return BlockMask(count)
    if torch.compiler.is_compiling():
        # Dynamo has no Tensor.random_, and indices have no advantage in fused code. With a
        # generator, None included, torch.rand takes no symbolic count.
        return BlockMask(count, mask=torch.rand(count, device=device) < p)
    use_indices = p <= MAX_INDEX_RATE
    if count * p < MIN_EXPECTED_BLOCKS or (not use_indices and device.type not in ("cpu", "cuda")):
        return BlockMask(count, mask=torch.rand(count, device=device, generator=generator) < p)
    if use_indices:
        # 1 - (1 - 1/count)^n = p
        n_indices = round(math.log1p(-p) / math.log1p(-1.0 / count))
        indices = torch.randint(count, (n_indices,), device=device, generator=generator)
        return BlockMask(count, indices=indices)
    # Four 16-bit words from each 64-bit random value, so the rate is p to 1/65536.
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    threshold = min(round(p * 65536) - 32768, 32767)
    return BlockMask(count, mask=words.view(torch.int16)[:count] < threshold)


class SharedMaskSampler:
    """Samples one J per forward for several layers that hold the same weight.

    The first layer of a forward draws a seed, which the others reuse; a layer that is called a
    second time starts a new forward. J depends on the seed only. Each layer also draws a ticket
    from torch's global generator, which identifies its call: when gradient checkpointing restores
    the generator and recomputes the layers in any order, the same ticket finds the same seed.
    """

    def __init__(self, members: int) -> None:
        self.members = members  # number of layers
        self.called: set[int] = set()  # indices of the layers that have sampled J so far
        self._seed: int | None = None
        self._called_in_forward: set[int] = set()
        self._seed_of_ticket: dict[int, int] = {}
        self._cached: tuple[tuple, list[BlockMask]] | None = None

    def seed_for(self, member: int) -> int:
        """Return the seed of J for a layer's current forward or recomputation."""
        ticket = int(torch.randint(2**63 - 1, (), device="cpu"))
        if in_backward() and ticket in self._seed_of_ticket:
            return self._seed_of_ticket[ticket]
        if self._seed is None or member in self._called_in_forward:
            self._seed, self._called_in_forward = ticket, set()
        self._called_in_forward.add(member)
        self._seed_of_ticket[ticket] = self._seed
        while len(self._seed_of_ticket) > MAX_REMEMBERED_SEEDS:
            del self._seed_of_ticket[next(iter(self._seed_of_ticket))]
        return self._seed

    @torch.compiler.disable
    def sample_masks(
        self, member: int, sizes: Sequence[tuple[int, float]], device: torch.device
    ) -> list[BlockMask]:
        """Sample J of each noise, given its (number of blocks, rate), for a layer's forward."""
        self.called.add(member)
        if all(p >= 1.0 for _, p in sizes):
            return [BlockMask(count) for count, _ in sizes]
        key = (self.seed_for(member), tuple(sizes), device)
        if self._cached is None or self._cached[0] != key:
            generator = torch.Generator(device).manual_seed(key[0])
            self._cached = key, [sample_mask(count, p, device, generator) for count, p in sizes]
        masks = self._cached[1]
        if len(self._called_in_forward) == self.members:
            self._cached = None  # free the memory
        return masks
