"""Two additive codebooks: a block is the sum of a centroid of each (as in AQLM and residual PQ).

With blocks twice as long and two indices per block the codes take as many bytes as plain product
quantization. That is the special case whose first centroids are zero in the second half of the
block and whose second ones are zero in the first: the sum can only be nearer, if it is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import to_blocks
from .base import QUANTIZERS
from .kmeans import (
    SAMPLE_POINTS,
    assign,
    chunk_rows,
    cluster_means,
    draw,
    kmeans,
    nearest_few,
    squared_errors,
)
from .product import ProductQuantizer

# First centroids tried for each block. With 8 the search loses about 1% to one with 32.
BEAM = 8
ROUNDS = 6


@QUANTIZERS.register("additive")
@dataclass(frozen=True)
class AdditiveQuantizer(ProductQuantizer):
    """Each block is stored as two indices, i and j: c1[i] + c2[j].

    State: as that of :class:`ProductQuantizer`, with both codebooks in ``codebook``, shape
    (2 n_centroids, block_size), the first on top; with 8 bits scale and zero point are those of
    each, shape (2, 1). Codes of a block stand side by side: (rows, 2 columns / block_size).

    The codebooks start from k-means and k-means of what it left; then codes (a beam search) and
    centroids (means of what the other codebook leaves) follow each other for a few rounds. The
    search is no exact one: a weight that is quantized again may find other, nearer sums.
    """

    scheme: ClassVar[str] = "additive"
    codes_per_block: ClassVar[int] = 2

    @property
    def short_name(self) -> str:
        return super().short_name.replace("pq ", "pq 2x", 1)

    def codebook_rows(self, codes):
        offsets = torch.tensor([0, self.n_centroids], device=codes.device, dtype=torch.int32)
        return (codes.int().unflatten(-1, (-1, 2)) + offsets).flatten(-2)

    def _cluster(self, seed, matrix, importance, start, n_iter):
        blocks = to_blocks(matrix, self.block_size).float()
        weights = self._block_weights(matrix, importance)
        generator = torch.Generator().manual_seed(seed)
        drawn = draw(len(blocks), SAMPLE_POINTS, generator).to(blocks.device)
        sample, own = blocks[drawn], None if weights is None else weights[drawn]
        if start is None:
            start = self._residual_start(sample, own, seed, n_iter)
        codebook, codes = start.float().clone(), None
        for _ in range(ROUNDS):
            codes = self._nearer(sample, own, codebook, codes)
            codebook = self._update(sample, own, codebook, codes)
        codes = self._assign(blocks, codebook, weights)
        if len(drawn) < len(blocks):
            codebook = self._update(blocks, weights, codebook, codes)
        decoded = codebook[self.codebook_rows(codes).long()].sum(1)
        return codebook, decoded.view(matrix.shape)

    def _residual_start(self, blocks, weights, seed, n_iter) -> Tensor:
        first = kmeans(blocks, self.n_centroids, n_iter=n_iter, seed=seed, weights=weights)
        left = blocks - first.centroids[first.codes]
        second = kmeans(left, self.n_centroids, n_iter=n_iter, seed=seed, weights=weights)
        return torch.cat([first.centroids, second.centroids])

    def _update(self, blocks, weights, codebook, codes) -> Tensor:
        """Each codebook in turn, twice: the means of what the other leaves; a centroid without
        blocks stays."""
        books = list(codebook.split(self.n_centroids))
        for own, other in ((0, 1), (1, 0)) * 2:
            left = blocks - books[other][codes[:, other]]
            means = cluster_means(left, codes[:, own], self.n_centroids, weights)
            used = torch.bincount(codes[:, own], minlength=self.n_centroids) > 0
            books[own] = torch.where(used[:, None], means, books[own])
        return torch.cat(books)

    def _nearer(self, blocks, weights, codebook, old: Tensor | None) -> Tensor:
        """The codes of a new search, or the old ones where it found nothing nearer."""
        found = self._assign(blocks, codebook, weights)
        if old is None:
            return found
        errors = [
            squared_errors(blocks, codebook[self.codebook_rows(codes).long()].sum(1), weights)
            for codes in (old, found)
        ]
        return torch.where((errors[1] < errors[0])[:, None], found, old)

    def _assign(self, blocks, codebook, weights):
        """Beam search, shape (N, 2): for each of the nearest first centroids the nearest second."""
        if weights is not None and weights.shape[1] == 1:
            weights = None  # one weight for a whole block moves none of its minima
        first, second = codebook.float().split(self.n_centroids)
        codes = torch.empty(len(blocks), 2, dtype=torch.int64, device=blocks.device)
        step = chunk_rows(self.n_centroids)
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step].float()
            own = None if weights is None else weights[start : start + step].float()
            few = nearest_few(part, first, BEAM, own)
            width = few.shape[1]
            left = (part[:, None] - first[few]).flatten(0, 1)
            own = None if own is None else own.repeat_interleave(width, 0)
            seconds = assign(left, second, weights=own)
            errors = squared_errors(left, second[seconds], own).view(-1, width)
            best = errors.argmin(1, keepdim=True)
            pair = (few.gather(1, best), seconds.view(-1, width).gather(1, best))
            torch.cat(pair, 1, out=codes[start : start + step])
        return codes

    def decode(self, codes, state):
        blocks = self._look_up(codes, state).unflatten(-2, (-1, 2)).sum(-2)
        return self._scaled(blocks.flatten(-2), state)
