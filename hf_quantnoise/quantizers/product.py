"""Product quantization (section 3.2): one codebook for all blocks of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..blocks import to_blocks
from ..configuration import QUANTIZERS
from ..configuration.checks import boolean, integer, one_of
from ..configuration.entries import MAX_BLOCK_SIZE, MAX_CENTROIDS
from ..layer_types import records_gradients
from .assignment import assign
from .base import Quantizer, StraightThrough, largest_magnitude, require_finite
from .centroid_gradients import AverageOverBlocks, Lookup
from .fixed_point import FixedPointQuantizer
from .gather import gather_rows, is_wide
from .half import clamp_to_half, round_to_half, to_half
from .kmeans import kmeans, update_centroids
from .packing import code_dtype
from .row_scale import as_divisor, fit_row_scale, lost_rows

# Section 3.3 applies Eq. 2 to the centroids: prefix and keys of its state.
_PREFIX = "codebook_"
_KEYS = tuple(FixedPointQuantizer(bits=8).state_spec(1, 1))


def _codebook_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return scale and zero point of an 8-bit codebook."""
    return {key: state[_PREFIX + key] for key in _KEYS}


@QUANTIZERS.register("pq")
@dataclass(frozen=True)
class ProductQuantizer(Quantizer):
    """Each block is stored as the index of its nearest centroid.

    With ``row_scale`` a row is its centroids times the scale of the row.

    State: ``codebook``, shape (n_centroids, block_size); with 8 bits per centroid also the scalars
    ``codebook_scale`` and ``codebook_zero_point`` of Eq. 2 on the codebook (section 3.3); with a
    scale per row ``row_scale``, shape (rows, 1), stored and used in float16.
    """

    # d, elements per block
    block_size: Annotated[int, integer(1, MAX_BLOCK_SIZE)] = 8
    # K; a code takes ceil(log2 K) bits
    n_centroids: Annotated[int, integer(2, MAX_CENTROIDS)] = 256
    # precision in which centroids are stored and used
    codebook_bits: Annotated[int, one_of((32, 16, 8))] = 32
    # maximum number of k-means iterations
    n_iter: Annotated[int, integer(1, 100_000)] = 20
    # whether each row has a scale, fitted with the codebook
    row_scale: Annotated[bool, boolean] = False

    scheme: ClassVar[str] = "pq"
    not_trained: ClassVar[frozenset[str]] = frozenset(_PREFIX + key for key in _KEYS)
    state_names: ClassVar[frozenset[str]] = not_trained | {"codebook", "row_scale"}
    positive: ClassVar[frozenset[str]] = frozenset({"codebook_scale"})

    @property
    def _eight_bits(self) -> FixedPointQuantizer:
        observer = "minmax" if self.codes_per_block == 1 else "channel"
        return FixedPointQuantizer(bits=8, observer=observer)

    def _books(self, codebook: Tensor) -> Tensor:
        """Return each codebook as a row, which has one scale in 8 bits."""
        return codebook.reshape(self.codes_per_block, -1)

    @property
    def code_bits(self) -> int:
        return math.ceil(math.log2(self.n_centroids))

    @property
    def codebook_size(self) -> int:
        """Number of centroids, of all codebooks."""
        return self.codes_per_block * self.n_centroids

    @property
    def n_values(self) -> int:
        return self.n_centroids

    @property
    def short_name(self) -> str:
        precision = {32: "", 16: " f16", 8: " int8"}[self.codebook_bits]
        scaled = " row scale" if self.row_scale else ""
        return f"pq {self.n_centroids}x{self.block_size}{precision}{scaled}"

    @torch.no_grad()
    def fit(self, matrix, *, seed=0, init=None, importance=None):
        require_finite(matrix)
        start = None if init is None else init["codebook"]
        if self.row_scale:
            cluster = partial(self._cluster, seed)
            start, scale = fit_row_scale(matrix.float(), importance, start, self.n_iter, cluster)
            return self.state_of(start.to(matrix.dtype), scale.to(matrix.dtype))
        codebook, _ = self._cluster(seed, matrix, importance, start, self.n_iter)
        return self.state_of(codebook.to(matrix.dtype))

    def state_of(self, codebook: Tensor, row_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Return the state of a fitted codebook, with the scale of each row if there is one."""
        state = {"codebook": codebook} | ({} if row_scale is None else {"row_scale": row_scale})
        if self.codebook_bits == 8:
            fitted = self._eight_bits.fit(self._books(codebook))
            state |= {_PREFIX + key: value for key, value in fitted.items()}
        return state

    def update_codebook(self, blocks, weights, codes, codebook, generator) -> Tensor:
        """Return the codebook of lowest error for given codes (N, codes_per_block)."""
        return update_centroids(blocks, weights, codes.view(-1), codebook, generator)

    def _cluster(
        self, seed, matrix, importance, start, n_iter
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Fit a codebook to a matrix; return it, and what decodes the matrix, both float32."""
        blocks = to_blocks(matrix, self.block_size)
        weights = self.block_weights(matrix, importance)
        codebook, codes = kmeans(
            blocks, self.n_centroids, n_iter=n_iter, seed=seed, init=start, weights=weights
        )
        return codebook, lambda: codebook[codes.int()].view_as(matrix)

    def block_weights(self, matrix: Tensor, importance: Tensor | None) -> Tensor | None:
        """Return the importance of each block element, (N, block_size); (N, 1) if it is per row."""
        if importance is None:
            return None
        if importance.shape[1] == 1:
            n_blocks = matrix.shape[1] // self.block_size
            return importance.expand(len(matrix), n_blocks).reshape(-1, 1)
        return to_blocks(importance.expand_as(matrix), self.block_size)

    def encode(self, matrix, state, importance=None):
        if self.row_scale:
            matrix = matrix.float() / as_divisor(self.scales(state).float())
        blocks = to_blocks(matrix, self.block_size)
        weights = self.block_weights(matrix, importance)
        codes = self._assign(blocks, self.centroids(state), weights)
        per_row = matrix.shape[1] // self.block_size * self.codes_per_block
        return codes.to(code_dtype(self.code_bits)).view(matrix.shape[0], per_row)

    def _assign(self, blocks: Tensor, codebook: Tensor, weights: Tensor | None) -> Tensor:
        """Return the codes of blocks (N, block_size): shape (N,), or (N, codes_per_block)."""
        return assign(blocks, codebook, weights, code_dtype(self.code_bits))

    def codebook_rows(self, codes: Tensor) -> Tensor:
        """Return the row of ``codebook`` of each code; the last dimension is along a matrix row."""
        return codes

    def decode(self, codes, state):
        blocks = self._centroids_of(self.codebook_rows(codes), state)
        if self.codes_per_block > 1:
            blocks = blocks.unflatten(-2, (-1, self.codes_per_block)).sum(-2)
        matrix = blocks.flatten(-2)
        return matrix * self.scales(state) if self.row_scale else matrix

    def _centroids_of(self, codes: Tensor, state: dict[str, Tensor]) -> Tensor:
        if records_gradients():
            return Lookup.apply(self.centroids(state), codes)
        codebook = state["codebook"]
        sizes = [self.block_size * size for size in (codebook.element_size(), 2)]
        if self.codebook_bits == 16 and [is_wide(codes, size) for size in sizes] == [False, True]:
            return gather_rows(to_half(codebook), codes).to(codebook.dtype)
        return gather_rows(self.centroids(state), codes)

    def state_spec(self, rows, columns):
        shape = (self.codebook_size, self.block_size)
        dtype = {32: torch.float32, 16: torch.float16, 8: torch.uint8}[self.codebook_bits]
        spec = {"codebook": (shape, dtype)}
        if self.row_scale:
            spec["row_scale"] = ((rows, 1), torch.float16)
        if self.codebook_bits == 8:
            state_spec = self._eight_bits.state_spec(self.codes_per_block, 1)
            spec |= {_PREFIX + key: value for key, value in state_spec.items()}
        return spec

    def state_of_rows(self, state, rows):
        return {**state, "row_scale": state["row_scale"][rows]} if self.row_scale else state

    def to_storage(self, state):
        spec = self.state_spec(1, 1)
        halves = {k: clamp_to_half(v) for k, v in state.items() if spec[k][1] == torch.float16}
        stored = super().to_storage({**state, **halves})
        if self.codebook_bits == 8:
            stored["codebook"] = self.integer_centroids(state)[0]
        return stored

    def integer_centroids(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes of 8-bit centroids, uint8 like the codebook, their scale and zero point."""
        on_codebook = _codebook_state(state)
        codes = self._eight_bits.encode(self._books(state["codebook"]), on_codebook)
        return codes.view_as(state["codebook"]), on_codebook["scale"], on_codebook["zero_point"]

    def from_storage(self, state):
        if self.codebook_bits != 8:
            return state
        codes = state["codebook"]
        decoded = self._eight_bits.decode(self._books(codes), _codebook_state(state))
        return {**state, "codebook": decoded.view_as(codes)}

    def block_counts(self, codes: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return |J_c|, the number of blocks of each centroid, for all codes; (codebook_size,)."""
        rows = self.codebook_rows(codes).reshape(-1).int()
        return torch.bincount(rows, minlength=self.codebook_size)

    def averaging(
        self, state: dict[str, Tensor], counts: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Return a state that decodes to the same; a centroid gets its blocks' mean gradient.

        ``counts`` returns :meth:`block_counts`; it is called if gradients are recorded.
        """
        if not (records_gradients() and state["codebook"].requires_grad):
            return state
        averaged = AverageOverBlocks.apply(state["codebook"], counts()[:, None])
        return {**state, "codebook": averaged}

    def centroids(self, state: dict[str, Tensor]) -> Tensor:
        """Return the centroids as stored, shape (n_centroids, block_size); straight-through.

        In training, scale and zero point of an 8-bit codebook are fitted to it again after each
        step. Before the first step they are unchanged.
        """
        codebook = state["codebook"]
        if self.codebook_bits == 32:
            return codebook
        trained = records_gradients() and codebook.requires_grad
        with torch.no_grad():
            if self.codebook_bits == 16:
                stored = round_to_half(codebook)
            else:
                on_codebook = _codebook_state(state)
                books = self._books(codebook)
                stored = self._eight_bits.quantize(books, on_codebook)
                if trained:
                    # Centroids just read from a file keep their scale and zero point: a new fit
                    # would differ in the last bits.
                    exact = (stored == books).all()
                    for key, value in self._eight_bits.fit(books).items():
                        on_codebook[key].copy_(torch.where(exact, on_codebook[key], value))
                    stored = self._eight_bits.quantize(books, on_codebook)
                stored = stored.view_as(codebook)
        return StraightThrough.apply(codebook, stored) if records_gradients() else stored

    def scales(self, state: dict[str, Tensor]) -> Tensor:
        """Return the scale of each row as stored, shape (rows, 1); straight-through."""
        scale = state["row_scale"]
        stored = round_to_half(scale.detach())
        return StraightThrough.apply(scale, stored) if records_gradients() else stored

    def for_values(self, matrix):
        largest, half = float(largest_magnitude(matrix)), torch.finfo(torch.float16)
        high = half.max / self.codes_per_block  # a centroid of a sum may be larger than the sum
        if self.codebook_bits != 16 or not largest or half.tiny <= largest <= high:
            return self
        return replace(self, codebook_bits=32)

    def check_values(self, matrix):
        if self.for_values(matrix) != self:
            return "float16 cannot hold its centroids; set codebook_bits=32"
        if self.row_scale and (lost := lost_rows(matrix)):
            return (
                f"row_scale=True stores the scale of each row in float16, and {lost} of its "
                f"{len(matrix)} rows are too small or too large for that, compared with the mean "
                "row; set row_scale=False"
            )
        if self.codebook_bits == 8 and (reason := self._eight_bits.check_values(matrix)):
            return reason
        return super().check_values(matrix)

    def check(self, rows, columns):
        if columns % self.block_size:
            return f"block size {self.block_size} does not divide its {columns} columns"
        blocks = rows * columns // self.block_size
        if blocks <= self.codebook_size:
            return f"it has only {blocks} blocks for {self.codebook_size} centroids"
        return None
