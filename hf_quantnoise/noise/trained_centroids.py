"""Gradients of a weight whose noise has trained centroids (``learn_codebooks``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..blocks import to_blocks
from ..quantizers.base import with_known_signature
from .block_mask import BlockMask


@dataclass(frozen=True)
class TrainedBlocks:
    """The blocks that one forward replaced, and what they were decoded from.

    Attributes:
        decoded: the quantized matrix, or some of its rows; differentiable in the trained state.
        chosen: J over its blocks.
        block_size: elements per block.
    """

    decoded: Tensor
    chosen: BlockMask
    block_size: int

    def of_rows(self, rows: Tensor) -> TrainedBlocks:
        """Return the same for a matrix whose row i has the noise of row ``rows[i]`` of this one.

        Both must be the same row of the weight.
        """
        n_blocks = self.decoded.shape[1] // self.block_size
        return replace(self, chosen=self.chosen.select_rows(rows, n_blocks))

    def without_rows(self, rows: Tensor) -> TrainedBlocks:
        """Return the same without gradients from some rows: those that are True, shape (n,)."""
        # The values are not read again, only the gradient.
        return replace(self, decoded=self.decoded.masked_fill(rows[:, None], 0.0))


def straight_through_both(matrix: Tensor, noisy: Tensor, trained: TrainedBlocks) -> Tensor:
    """Return ``noisy``, with gradients to the weight and to what its blocks were decoded from.

    The weight (``matrix``, or some of its rows) gets the gradient unchanged (Eq. 7), the decoded
    matrix that of the blocks in J.
    """
    mask = None if trained.chosen.is_full else trained.chosen.as_mask()
    return _ToBoth.apply(matrix, trained.decoded, noisy, mask, trained.block_size)


@with_known_signature
class _ToBoth(torch.autograd.Function):
    @staticmethod
    def forward(matrix, decoded, noisy, mask, block_size):
        return noisy.view_as(noisy)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mask, ctx.block_size = inputs[3:]
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (mask,) = ctx.saved_tensors
        of_decoded = gradient
        if mask is not None:
            blocks = to_blocks(gradient, ctx.block_size) * mask[:, None]
            of_decoded = blocks.view(gradient.shape)
        return gradient, of_decoded, None, None, None
