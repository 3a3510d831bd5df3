"""Gradients of centroids: a sum over blocks that is quick, and its average (section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import with_known_signature
from .gather import gather_rows


@with_known_signature
class Lookup(torch.autograd.Function):
    """codebook[codes], with a backward that sums the gradient over each centroid's blocks.

    The same as ``F.embedding``, whose backward is several times slower for a small codebook.
    """

    @staticmethod
    def forward(codebook: Tensor, codes: Tensor) -> Tensor:
        return gather_rows(codebook, codes)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        codebook, codes = inputs
        ctx.save_for_backward(codes)
        ctx.n_centroids = len(codebook)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (codes,) = ctx.saved_tensors
        blocks = gradient.reshape(-1, gradient.shape[-1])
        total = blocks.new_zeros(ctx.n_centroids, blocks.shape[1], dtype=torch.float32)
        total.index_add_(0, codes.reshape(-1).long(), blocks.float())
        return total.to(gradient.dtype), None


@with_known_signature
class AverageOverBlocks(torch.autograd.Function):
    """Identity whose gradient is divided by the number of blocks of the centroid.

    Autograd sums the gradients of a centroid's blocks; section 3.2 averages them:
    c <- c - eta / |J_c| * sum over (k, l) in J_c of dL/db_kl.
    """

    @staticmethod
    def forward(codebook: Tensor, counts: Tensor) -> Tensor:
        return codebook.view_as(codebook)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (counts,) = ctx.saved_tensors
        # In float32: float16 ends at 65,504 blocks.
        return (gradient.float() / counts.clamp(min=1)).to(gradient.dtype), None
