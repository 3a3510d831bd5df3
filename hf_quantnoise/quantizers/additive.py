"""Additive quantization: a block is the sum of one centroid from each of two codebooks.

As in AQLM and residual PQ. With blocks of twice the length and two codes each, the codes take as
many bytes as in product quantization, which is the special case where first centroids are zero in
the second half of the block and second ones in the first. The optimum can therefore only be better;
whether it is found depends on the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import to_blocks
from ..configuration import QUANTIZERS
from .assignment import assign, chunk_rows, nearest_few, squared_errors
from .kmeans import SAMPLE_POINTS, cluster_means, kmeans, sample_indices
from .product import ProductQuantizer

# First centroids tried for each block. With 8 the error is about 1% higher than with 32.
BEAM = 8
ROUNDS = 6


@QUANTIZERS.register("additive")
@dataclass(frozen=True)
class AdditiveQuantizer(ProductQuantizer):
    """Each block is stored as two codes, i and j: c1[i] + c2[j].

    State: that of :class:`ProductQuantizer`, with both codebooks in ``codebook``, shape
    (2 n_centroids, block_size), the first on top. With 8-bit centroids each codebook has its own
    scale and zero point, shape (2, 1). Codes have shape (rows, 2 columns / block_size); those of a
    block are adjacent.

    The codebooks start from k-means, and k-means of its residuals. Then the codes (beam search) and
    the centroids (means of the other codebook's residuals) are updated in turn for a few rounds.
    The search is not exact: quantizing a weight again may find other codes of lower error.
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
        weights = self.block_weights(matrix, importance)
        generator = torch.Generator().manual_seed(seed)
        chosen = sample_indices(len(blocks), SAMPLE_POINTS, generator).to(blocks.device)
        sample, sample_weights = blocks[chosen], None if weights is None else weights[chosen]
        if start is None:
            start = self._residual_start(sample, sample_weights, seed, n_iter)
        codebook, codes = start.float().clone(), None
        for _ in range(ROUNDS):
            codes = self._improve_codes(sample, sample_weights, codebook, codes)
            codebook = self.update_codebook(sample, sample_weights, codes, codebook)
        codes = self._assign(blocks, codebook, weights)
        if len(chosen) < len(blocks):
            codebook = self.update_codebook(blocks, weights, codes, codebook)
        return codebook, lambda: self._sums(codebook, codes).view(matrix.shape)

    def _sums(self, codebook: Tensor, codes: Tensor) -> Tensor:
        """Return the sum of the two centroids of each block, (N, block_size)."""
        return codebook[self.codebook_rows(codes).long()].sum(1)

    def _residual_start(self, blocks, weights, seed, n_iter) -> Tensor:
        """Return the codebooks of k-means, and of k-means of its residuals."""
        options = {"n_iter": n_iter, "seed": seed, "weights": weights}
        first, codes = kmeans(blocks, self.n_centroids, **options)
        second, _ = kmeans(blocks - first[codes.int()], self.n_centroids, **options)
        return torch.cat([first, second])

    def update_codebook(self, blocks, weights, codes, codebook, generator=None) -> Tensor:
        """Set each codebook in turn, twice, to the means of the other one's residuals.

        A centroid without blocks is unchanged.
        """
        books = list(codebook.split(self.n_centroids))
        for book, other in ((0, 1), (1, 0)) * 2:
            residuals = blocks - books[other][codes[:, other]]
            means = cluster_means(residuals, codes[:, book], self.n_centroids, weights)
            used = torch.bincount(codes[:, book], minlength=self.n_centroids) > 0
            books[book] = torch.where(used[:, None], means, books[book])
        return torch.cat(books)

    def _improve_codes(self, blocks, weights, codebook, old: Tensor | None) -> Tensor:
        """Return the codes of a new search, or the old ones where they have a lower error."""
        new = self._assign(blocks, codebook, weights)
        if old is None:
            return new
        old_errors, new_errors = (
            squared_errors(blocks, self._sums(codebook, codes), weights) for codes in (old, new)
        )
        return torch.where((new_errors < old_errors)[:, None], new, old)

    def _assign(self, blocks, codebook, weights):
        """Beam search: the nearest second centroid for each of the nearest first ones; (N, 2)."""
        if weights is not None and weights.shape[1] == 1:
            weights = None  # a constant weight per block does not change its minimum
        first, second = codebook.float().split(self.n_centroids)
        codes = torch.empty(len(blocks), 2, dtype=torch.int64, device=blocks.device)
        step = chunk_rows(self.n_centroids)
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step].float()
            part_weights = None if weights is None else weights[start : start + step].float()
            firsts = nearest_few(part, first, BEAM, part_weights)
            width = firsts.shape[1]
            residuals = (part[:, None] - first[firsts]).flatten(0, 1)
            if part_weights is not None:
                part_weights = part_weights.repeat_interleave(width, 0)
            seconds = assign(residuals, second, weights=part_weights)
            errors = squared_errors(residuals, second[seconds], part_weights).view(-1, width)
            best = errors.argmin(1, keepdim=True)
            pair = (firsts.gather(1, best), seconds.view(-1, width).gather(1, best))
            torch.cat(pair, 1, out=codes[start : start + step])
        return codes
