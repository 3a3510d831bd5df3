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
from .fixed_point import FixedPointQuantizer
from .kmeans import assign, kmeans
from .packing import code_dtype


class _AsStored(torch.autograd.Function):
    """Centroids as they are stored, straight-through."""

    @staticmethod
    def forward(ctx, codebook: Tensor, stored: Tensor) -> Tensor:
        return stored.view_as(stored)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


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


# Section 3.3: Eq. 2 on the centroids themselves, and how its state is named in theirs.
_EIGHT_BITS = FixedPointQuantizer(bits=8)
_ON_CODEBOOK = "codebook_"
_KEYS = tuple(_EIGHT_BITS.state_spec(1, 1))


def _of_codebook(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: state[_ON_CODEBOOK + key] for key in _KEYS}


@QUANTIZERS.register("pq")
@dataclass(frozen=True)
class ProductQuantizer(Quantizer):
    """Each block is stored as the index of its nearest centroid.

    State: ``codebook``, shape (n_centroids, block_size); with 8 bits per centroid also the scalars
    ``codebook_scale`` and ``codebook_zero_point`` of Eq. 2 on the codebook (section 3.3).

    Args:
        block_size: d, numbers per block.
        n_centroids: K; a code takes ceil(log2 K) bits.
        codebook_bits: 32, 16 or 8: precision in which centroids are stored, and therefore used.
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
        precision = {32: "", 16: " f16", 8: " int8"}[self.codebook_bits]
        return f"pq {self.n_centroids}x{self.block_size}{precision}"

    def fit(self, matrix, *, seed=0, init=None, importance=None):
        start = None if init is None else init["codebook"]
        result = kmeans(
            to_blocks(matrix, self.block_size),
            self.n_centroids,
            n_iter=self.n_iter,
            seed=seed,
            init=start,
            weights=self._block_weights(matrix, importance),
        )
        state = {"codebook": result.centroids.to(matrix.dtype)}
        if self.codebook_bits == 8:
            fitted = _EIGHT_BITS.fit(state["codebook"])
            state |= {_ON_CODEBOOK + key: value for key, value in fitted.items()}
        return state

    def _block_weights(self, matrix: Tensor, importance: Tensor | None) -> Tensor | None:
        """The importance of each number of each block (N, block_size); (N, 1) by rows alone."""
        if importance is None:
            return None
        if importance.shape[1] == 1:
            n_blocks = matrix.shape[1] // self.block_size
            return importance.expand(len(matrix), n_blocks).reshape(-1, 1)
        return to_blocks(importance.expand_as(matrix), self.block_size)

    def encode(self, matrix, state, importance=None):
        codes = assign(
            to_blocks(matrix, self.block_size),
            self.centroids(state),
            weights=self._block_weights(matrix, importance),
        )
        return codes.to(code_dtype(self.code_bits)).view(matrix.shape[0], -1)

    def decode(self, codes, state):
        return _Lookup.apply(self.centroids(state), codes).flatten(-2)

    def state_spec(self, rows, columns):
        shape = (self.n_centroids, self.block_size)
        if self.codebook_bits == 8:
            on_codebook = _EIGHT_BITS.state_spec(*shape)
            extra = {_ON_CODEBOOK + key: value for key, value in on_codebook.items()}
            return {"codebook": (shape, torch.uint8), **extra}
        return {"codebook": (shape, torch.float16 if self.codebook_bits == 16 else torch.float32)}

    @property
    def not_trained(self):
        return {_ON_CODEBOOK + key for key in _KEYS}

    def to_storage(self, key, tensor, state):
        if key != "codebook" or self.codebook_bits != 8:
            return super().to_storage(key, tensor, state)
        return _EIGHT_BITS.encode(tensor, _of_codebook(state))

    @property
    def is_stored_otherwise(self):
        return self.codebook_bits == 8

    def from_storage(self, state):
        if self.codebook_bits != 8:
            return state
        return {**state, "codebook": _EIGHT_BITS.decode(state["codebook"], _of_codebook(state))}

    def centroids(self, state: dict[str, Tensor]) -> Tensor:
        """The centroids as they are stored, shape (n_centroids, block_size); straight-through.

        In training, scale and zero point of an 8-bit codebook follow it from step to step.
        """
        codebook = state["codebook"]
        if self.codebook_bits == 32:
            return codebook
        trained = torch.is_grad_enabled() and codebook.requires_grad
        with torch.no_grad():
            if self.codebook_bits == 16:
                limit = torch.finfo(torch.float16).max
                stored = codebook.clamp(-limit, limit).to(torch.float16).to(codebook.dtype)
            else:
                on_codebook = _of_codebook(state)
                if trained:
                    for key, value in _EIGHT_BITS.fit(codebook).items():
                        on_codebook[key].copy_(value)
                stored = _EIGHT_BITS.quantize(codebook, on_codebook)
        return _AsStored.apply(codebook, stored)

    def check(self, rows, columns):
        if columns % self.block_size:
            return f"block size {self.block_size} does not divide its {columns} columns"
        blocks = rows * columns // self.block_size
        if blocks <= self.n_centroids:
            return f"it has only {blocks} blocks for {self.n_centroids} centroids"
        return None
