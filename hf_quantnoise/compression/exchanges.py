"""Which blocks would pay with another codeword, told by a gradient; putting them there, and back.

With g the gradient of a loss by a decoded block b, another codeword c in its place changes the loss
by

    <g, c - b> + k/2 ||c - b||^2,    k: the curvature, unknown,

which is a fall where k is below twice -<g, c - b> / ||c - b||^2. The exchanges of the largest such
ratio are those that pay at the largest k. One code of a row at most, since the blocks of a row mend
the same error of the same output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import broadcast_object
from ..modeling import PackedLayer, set_codes
from ..quantizers.kmeans import MAX_BYTES, chunk_rows

_EXACT = "donot_use_mm_for_euclid_dist"


def _squared_distances(some: Tensor, book: Tensor) -> Tensor:
    """From some codewords to all, shape (some, K): exact, and infinite to a codeword's equals, an
    exchange for which changes nothing."""
    squares = torch.cdist(some, book, compute_mode=_EXACT).square_()
    return squares.masked_fill_(squares == 0, torch.inf)


def _best_codes(
    book: Tensor, table: Tensor | None, codes: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each block the new code with the largest ratio; see the module's docstring.

    A chunk holds four matrices (blocks, K) at most, of ``MAX_BYTES`` each, or of one block where
    that is larger.

    Args:
        book: centroids, shape (K, d), float32.
        table: squared distances of all to all, if they are at hand.
        codes: which one each block has, shape (N,), int64.
        slopes: gradient by each block, shape (N, d).

    Returns:
        (ratios, new codes), each of shape (N,); ratio 0 where no other centroid differs.
    """
    ratios, new = slopes.new_empty(len(codes)), torch.empty_like(codes)
    step = chunk_rows(len(book))
    chunks = (each.split(step) for each in (codes, slopes, ratios, new))
    for own, slope, *best in zip(*chunks, strict=True):
        along = slope @ book.t()
        falls = along.gather(1, own[:, None]) - along
        squares = _squared_distances(book[own], book) if table is None else table[own]
        torch.max(falls.div_(squares), 1, out=best)
    return ratios, new


def _best_of_rows(layer: PackedLayer, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the one exchange of a code with the largest ratio; see the module's docstring.

    Returns:
        (ratios, places in the row of codes, new codes), each of shape (rows,).
    """
    quantizer, m = layer.quantizer, layer.quantizer.codes_per_block
    state = {key: value.detach() for key, value in layer.state.items()}
    books = quantizer.centroids(state).float().view(m, quantizer.n_centroids, -1)
    # For all codewords at once where that is small: made for each block it takes twice the time.
    small = 4 * quantizer.n_centroids**2 <= MAX_BYTES
    tables = [_squared_distances(book, book) if small else None for book in books]
    scales = quantizer.scales(state).float() if quantizer.row_scale else None
    all_codes = layer.codes()
    found = []
    step = max(1, chunk_rows(quantizer.n_centroids) // layer.codes_per_row)
    for start in range(0, layer.rows, step):
        rows = slice(start, start + step)
        slopes = torch.nan_to_num(gradient[rows], nan=0.0, posinf=0.0, neginf=0.0)
        if scales is not None:
            slopes = slopes * scales[rows]
        slopes = slopes.reshape(-1, quantizer.block_size)
        codes = all_codes[rows].reshape(-1, m).long()
        best = [
            _best_codes(*pair, codes[:, i], slopes)
            for i, pair in enumerate(zip(books, tables, strict=True))
        ]
        ratios, new = (
            torch.stack(each, 1).view(-1, layer.codes_per_row) for each in zip(*best, strict=True)
        )
        ratios, places = ratios.max(1)
        found.append((ratios, places, new.gather(1, places[:, None])[:, 0]))
    ratios, places, new = map(torch.cat, zip(*found, strict=True))
    if scales is not None:
        ratios = ratios / scales[:, 0].square().clamp_min(torch.finfo(torch.float32).tiny)
    return ratios, places, new


class Exchanges:
    """Blocks of a model and the codes they could have instead, the most promising first.

    Args:
        weights: for each weight the packed layers that hold it.
        found: the weight's number, row, place in the row and new code of each, shape (exchanges,
            4); no place of a weight twice.

    Attributes:
        codes: the new codes, shape (exchanges,).
        blocks: of all these weights together.
    """

    def __init__(self, weights: Sequence[list[PackedLayer]], found: Tensor) -> None:
        self.weights = weights
        self._numbers, self._rows, self._places, self.codes = found.unbind(1)
        self.blocks = _blocks(weights)

    def __len__(self) -> int:
        return len(self.codes)

    @torch.no_grad()
    def put(self, codes: Tensor) -> Tensor:
        """Gives the first places other codes, in place.

        Args:
            codes: for as many of the first places as there are, shape (count,).

        Returns:
            The codes they had, shape (count,). Put there again, they leave every bit as it was.
        """
        had, count = torch.empty_like(codes), len(codes)
        for number in self._numbers[:count].unique().tolist():
            layers, chosen = self.weights[number], self._numbers[:count] == number
            own = layers[0].codes().clone()
            where = tuple(x[:count][chosen].to(own.device) for x in (self._rows, self._places))
            had[chosen] = own[where].to(had)
            own[where] = codes[chosen].to(own)
            set_codes(layers, own)
        return had


def _blocks(weights: Sequence[list[PackedLayer]]) -> int:
    return sum(one.rows * one.columns // one.quantizer.block_size for one, *_ in weights)


@torch.no_grad()
def promising(weights: Sequence[tuple[list[PackedLayer], Tensor]], share: float) -> Exchanges:
    """The exchanges of the largest ratios over all weights; see the module's docstring. Those of
    rank 0, on every rank.

    Args:
        weights: for each weight the packed layers that hold it, and the gradient of the loss by
            the decoded matrix, shape (rows, columns), float32.
        share: of all blocks of these weights at most this share, rounded up.
    """
    layers = [holders for holders, _ in weights]
    best = [_best_of_rows(holders[0], gradient) for holders, gradient in weights]
    ratios = torch.cat([ratios.cpu() for ratios, _, _ in best])
    table = torch.cat([
        torch.stack([torch.full_like(places, number), torch.arange(len(places)), places, new], 1)
        for number, (places, new) in enumerate((p.cpu(), n.cpu()) for _, p, n in best)
    ])  # fmt: skip
    top = ratios.topk(min(math.ceil(share * _blocks(layers)), len(ratios)))
    return Exchanges(layers, broadcast_object(table[top.indices[top.values > 0]]))
