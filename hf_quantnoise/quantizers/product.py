"""Product quantization (section 3.2): one codebook for all blocks of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import to_blocks
from .base import QUANTIZERS, Quantizer
from .kmeans import assign, kmeans
from .packing import code_dtype


class _RoundToHalf(torch.autograd.Function):
    """float16 values, straight-through: centroids are used as they are stored."""

    @staticmethod
    def forward(ctx, codebook: Tensor) -> Tensor:
        limit = torch.finfo(torch.float16).max
        return codebook.clamp(-limit, limit).to(torch.float16).to(codebook.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _Lookup(torch.autograd.Function):
    """codebook[codes], whose backward sums the gradient over each centroid's blocks.

    The same as ``F.embedding``, whose backward is several times slower for a small codebook.
    """

    @staticmethod
    def forward(ctx, codebook: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.n_centroids = len(codebook)
        return F.embedding(codes.int(), codebook)  # much faster than indexing

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (codes,) = ctx.saved_tensors
        blocks = gradient.reshape(-1, gradient.shape[-1])
        total = blocks.new_zeros(ctx.n_centroids, blocks.shape[1], dtype=torch.float32)
        total.index_add_(0, codes.reshape(-1).long(), blocks.float())
        return total.to(gradient.dtype), None


@QUANTIZERS.register("pq")
@dataclass(frozen=True)
class ProductQuantizer(Quantizer):
    """Each block is stored as the index of its nearest centroid.

    State: ``codebook``, shape (n_centroids, block_size).

    Args:
        block_size: d, numbers per block.
        n_centroids: K; a code takes ceil(log2 K) bits.
        codebook_bits: 32 or 16: precision in which centroids are stored, and therefore used.
        n_iter: most iterations of k-means.
    """

    block_size: int = 8
    n_centroids: int = 256
    codebook_bits: int = 32
    n_iter: int = 20

    scheme: ClassVar[str] = "pq"

    @property
    def code_bits(self) -> int:
        return math.ceil(math.log2(self.n_centroids))

    @property
    def short_name(self) -> str:
        half = " f16" if self.codebook_bits == 16 else ""
        return f"pq {self.n_centroids}x{self.block_size}{half}"

    def fit(self, matrix, *, seed=0, init=None):
        start = None if init is None else init["codebook"]
        result = kmeans(
            to_blocks(matrix, self.block_size),
            self.n_centroids,
            n_iter=self.n_iter,
            seed=seed,
            init=start,
        )
        return {"codebook": self._stored(result.centroids.to(matrix.dtype))}

    def encode(self, matrix, state):
        codes = assign(to_blocks(matrix, self.block_size), self._stored(state["codebook"]))
        return codes.to(code_dtype(self.code_bits)).view(matrix.shape[0], -1)

    def decode(self, codes, state):
        return _Lookup.apply(self._stored(state["codebook"]), codes).flatten(-2)

    def state_spec(self, rows, columns):
        dtype = torch.float16 if self.codebook_bits == 16 else torch.float32
        return {"codebook": ((self.n_centroids, self.block_size), dtype)}

    def check(self, rows, columns):
        if columns % self.block_size:
            return f"block size {self.block_size} does not divide its {columns} columns"
        blocks = rows * columns // self.block_size
        if blocks <= self.n_centroids:
            return f"it has only {blocks} blocks for {self.n_centroids} centroids"
        return None

    def _stored(self, codebook: Tensor) -> Tensor:
        return _RoundToHalf.apply(codebook) if self.codebook_bits == 16 else codebook
