"""J, the random blocks that a noise falls on in one forward (Eq. 6).

Drawing is what noise costs, so it is done the cheapest way for each rate: a list of random indices
for small rates, a mask made of 16-bit random words for large ones. Draws come from torch's global
generator inside the layer's forward: a seed reproduces them, and the recomputation of gradient
checkpointing, which restores that generator, sees the same J again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Above this rate a mask is cheaper than the longer and longer list of draws.
MASK_ABOVE = 0.3
# Below so many expected blocks a fixed number of draws would round the share noticeably.
FEW_BLOCKS = 64
# How many past draws of a tied weight can still be recomputed.
REMEMBERED_DRAWS = 4096


@dataclass(frozen=True)
class BlockMask:
    """J, as a subset of ``count`` blocks in row-major order.

    Attributes:
        count: number of blocks to choose from.
        indices: the chosen blocks, shape (k,), int64, some of them twice; or None.
        mask: True for the chosen blocks, shape (count,); or None. With neither, all are chosen.
    """

    count: int
    indices: Tensor | None = None
    mask: Tensor | None = None

    @property
    def everything(self) -> bool:
        """Whether J holds every block (p = 1, QAT)."""
        return self.indices is None and self.mask is None

    def as_mask(self, device: torch.device | str | None = None) -> Tensor:
        """True for the chosen blocks, shape (count,)."""
        if self.mask is not None:
            return self.mask
        if self.indices is None:
            return torch.ones(self.count, dtype=torch.bool, device=device)
        mask = torch.zeros(self.count, dtype=torch.bool, device=self.indices.device)
        return mask.index_fill_(0, self.indices, True)

    def of_rows(self, rows: Tensor, blocks_per_row: int) -> BlockMask:
        """The part of J that falls on some rows: rows, shape (n,), may repeat."""
        if self.everything:
            return BlockMask(rows.numel() * blocks_per_row)
        return BlockMask(
            rows.numel() * blocks_per_row,
            mask=self.as_mask().view(-1, blocks_per_row)[rows].reshape(-1),
        )

    def of_clusters(self, codes: Tensor) -> BlockMask:
        """J over blocks, from J over clusters: codes, any shape, name the cluster of each block."""
        if self.everything:
            return BlockMask(codes.numel())
        mask = self.as_mask().to(codes.device)
        return BlockMask(codes.numel(), mask=mask[codes.reshape(-1).int()])

    def zero(self, blocks: Tensor) -> None:
        """Zeroes the chosen blocks in place; blocks: (count, block size), contiguous."""
        if self.indices is not None:
            blocks.index_fill_(0, self.indices, 0.0)
        elif self.mask is not None:
            blocks.mul_(~self.mask[:, None])  # masked_fill_ branches: up to five times slower
        else:
            blocks.zero_()

    def replace(self, blocks: Tensor, values: Callable[[Tensor | None], Tensor]) -> None:
        """Replaces the chosen blocks in place.

        Args:
            blocks: (count, block size), contiguous.
            values: gives the new blocks for a list of indices, shape (k, block size), or for None
                those of all blocks, shape (count, block size).
        """
        new = values(self.indices).to(blocks.dtype)
        if self.indices is not None and blocks.shape[1] == 1:
            blocks.view(-1).scatter_(0, self.indices, new.reshape(-1))
        elif self.indices is not None:
            blocks.index_copy_(0, self.indices, new)
        elif self.mask is not None:
            # Exact for weights 0 and 1, and without the branches of torch.where.
            blocks.lerp_(new.view(blocks.shape), self.mask[:, None].to(blocks.dtype))
        else:
            blocks.copy_(new.view(blocks.shape))


def draw(
    count: int, p: float, device: torch.device, generator: torch.Generator | None = None
) -> BlockMask:
    """Draws J: each of ``count`` blocks with probability ``p``, 0 < p <= 1.

    The share is unbiased at any size: a fixed number of draws with replacement, chosen so that the
    expected share is p, is taken only where its rounding does not show. p = 1 draws nothing.

    Args:
        count: number of blocks.
        p: rate.
        device: where the blocks live.
        generator: None takes torch's global one.
    """
    if p >= 1.0:
        return BlockMask(count)
    # Dynamo has no Tensor.random_, and a list of draws has no advantage in fused code.
    if torch.compiler.is_compiling() or count * p < FEW_BLOCKS:
        return BlockMask(count, mask=torch.rand(count, device=device, generator=generator) < p)
    if p <= MASK_ABOVE:
        # 1 - (1 - 1/count)^draws = p
        draws = round(math.log1p(-p) / math.log1p(-1.0 / count))
        indices = torch.randint(count, (draws,), device=device, generator=generator)
        return BlockMask(count, indices=indices)
    return BlockMask(count, mask=_random_mask(count, p, device, generator))


def _random_mask(
    count: int, p: float, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """True with probability p, to 1/65536: four 16-bit words from each 64-bit random number."""
    if device.type not in ("cpu", "cuda"):
        return torch.rand(count, device=device, generator=generator) < p
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    threshold = min(round(p * 65536) - 32768, 32767)
    return words.view(torch.int16)[:count] < threshold


def in_backward() -> bool:
    """Whether a backward pass is running: a forward inside of it can only be the recomputation of
    gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


class SharedMaskSampler:
    """One J per forward for several layers that hold the same weight.

    The first layer of a forward draws a seed; the others take it up; a layer that comes a second
    time begins a new forward. J follows from the seed alone. Each layer also draws a ticket from
    torch's global generator, only to be known again: in the recomputation of gradient checkpointing
    the restored generator gives the same ticket, whatever the order in which layers come back.

    Args:
        members: number of layers.

    Attributes:
        met: numbers of the layers that have asked for J yet.
    """

    def __init__(self, members: int) -> None:
        self.members = members
        self.met: set[int] = set()
        self._seed: int | None = None
        self._done: set[int] = set()
        self._seed_of_ticket: dict[int, int] = {}
        self._cached: tuple[tuple, list[BlockMask]] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cached": None}

    def seed_for(self, member: int) -> int:
        """The seed of J for a layer's present forward (or recomputation)."""
        ticket = int(torch.randint(2**63 - 1, ()))
        if in_backward() and ticket in self._seed_of_ticket:
            return self._seed_of_ticket[ticket]
        if self._seed is None or member in self._done:
            self._seed, self._done = ticket, set()
        self._done.add(member)
        self._seed_of_ticket[ticket] = self._seed
        while len(self._seed_of_ticket) > REMEMBERED_DRAWS:
            del self._seed_of_ticket[next(iter(self._seed_of_ticket))]
        return self._seed

    @torch.compiler.disable
    def draw(
        self, member: int, sizes: Sequence[tuple[int, float]], device: torch.device
    ) -> list[BlockMask]:
        """J of each noise, for a layer's present forward.

        Args:
            member: number of the layer.
            sizes: (number of blocks, rate) of each noise in order.
            device: where the blocks live.
        """
        self.met.add(member)
        if all(p >= 1.0 for _, p in sizes):
            return [BlockMask(count) for count, _ in sizes]
        key = (self.seed_for(member), tuple(sizes), device)
        if self._cached is not None and self._cached[0] == key:
            selections = self._cached[1]
        else:
            generator = torch.Generator(device).manual_seed(key[0])
            selections = [draw(count, p, device, generator) for count, p in sizes]
        self._cached = None if len(self._done) == self.members else (key, selections)
        return selections
