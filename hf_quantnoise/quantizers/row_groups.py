"""Product quantization of a table in groups of rows, each with its own block size and codebook.

Lookups of words follow Zipf's law: a quarter of a vocabulary serves more than nine in ten of them.
Frequent rows in small blocks and rare ones in large blocks take fewer bytes than one size for all,
and lose less where it counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..configuration import QUANTIZERS
from ..configuration.checks import boolean, integer, list_of, one_of
from ..configuration.entries import MAX_BLOCK_SIZE, MAX_CENTROIDS
from ..layer_types import records_gradients
from .additive import AdditiveQuantizer
from .base import Quantizer, select_rows
from .centroid_gradients import AverageOverBlocks
from .packing import code_dtype, pack_codes, unpack_codes
from .product import ProductQuantizer

MAX_GROUPS = 16


@QUANTIZERS.register("row_groups")
@dataclass(frozen=True)
class RowGroupQuantizer(Quantizer):
    """A table whose rows are stored in groups, the most frequent rows in the first one.

    Rows keep their order. Codes have as many columns as the rows of the smallest blocks need; other
    rows have zeros at their end, which are not packed: the packed codes are those of the rows of
    the first group, then those of the next one.

    State: ``row_groups``, the group of each row, packed to ceil(log2 groups) bits. :meth:`fit`
    takes it from ``init`` (:meth:`row_groups_of` makes it); without it the first rows are the first
    group. ``codebook``, the values of the codebooks of all groups one after the other, and, with 8
    bits per centroid, their scales and zero points; all one-dimensional. ``row_scale`` as in
    :class:`ProductQuantizer`. In the state of some rows ``groups`` has their groups, unpacked.
    """

    # number of rows of each group
    group_rows: Annotated[tuple[int, ...], list_of(integer(1), 2, MAX_GROUPS)] = ()
    # d of each group
    block_sizes: Annotated[tuple[int, ...], list_of(integer(1, MAX_BLOCK_SIZE), 2, MAX_GROUPS)] = ()
    # as in ProductQuantizer, for every group, as are the following
    n_centroids: Annotated[int, integer(2, MAX_CENTROIDS)] = 256
    # with 2, groups are quantized as by AdditiveQuantizer
    n_codebooks: Annotated[int, one_of((1, 2))] = 1
    codebook_bits: Annotated[int, one_of((32, 16, 8))] = 32
    n_iter: Annotated[int, integer(1, 100_000)] = 20
    row_scale: Annotated[bool, boolean] = False

    scheme: ClassVar[str] = "row_groups"
    not_trained: ClassVar[frozenset[str]] = ProductQuantizer.not_trained | {"row_groups"}
    state_names: ClassVar[frozenset[str]] = ProductQuantizer.state_names | {"row_groups"}
    positive: ClassVar[frozenset[str]] = ProductQuantizer.positive
    integers: ClassVar[frozenset[str]] = frozenset({"row_groups"})

    def __post_init__(self) -> None:
        for name in ("group_rows", "block_sizes"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def parts(self) -> tuple[ProductQuantizer, ...]:
        """The quantizer of each group."""
        cls = ProductQuantizer if self.n_codebooks == 1 else AdditiveQuantizer
        shared = (self.n_centroids, self.codebook_bits, self.n_iter, self.row_scale)
        return tuple(cls(size, *shared) for size in self.block_sizes)

    @property
    def code_bits(self) -> int:
        return self.parts[0].code_bits

    @property
    def n_values(self) -> int:
        return self.n_centroids

    @property
    def short_name(self) -> str:
        rows, others = self.group_rows[0], "".join(f", x{size}" for size in self.block_sizes[1:])
        return f"{self.parts[0].short_name} ({rows} rows){others}"

    @property
    def block_size(self) -> int:  # type: ignore[override]
        """The largest size that divides the blocks of all groups, for masks over blocks."""
        return math.gcd(*self.block_sizes)

    # ---- groups of rows --------------------------------------------------------------------------

    @property
    def _group_bits(self) -> int:
        return math.ceil(math.log2(len(self.group_rows)))

    def row_groups_of(self, counts: Tensor) -> Tensor:
        """Return ``row_groups`` for the number of lookups of each row, shape (rows,).

        Of rows with equal counts, which includes unseen ones, the first count as more frequent:
        tokenizers number their words so.
        """
        sizes = torch.tensor(self.group_rows, device=counts.device)
        groups = torch.empty(len(counts), dtype=torch.int64, device=counts.device)
        order = torch.sort(counts, descending=True, stable=True).indices
        groups[order] = torch.arange(len(sizes), device=counts.device).repeat_interleave(sizes)
        return pack_codes(groups, self._group_bits)

    def invalid_row_groups(self, row_groups: Tensor) -> str | None:
        """Return why a tensor of a file does not put the right number of rows in each group."""
        groups = self.groups({"row_groups": row_groups}).int()
        found = torch.bincount(groups, minlength=len(self.group_rows)).tolist()
        if found == list(self.group_rows):
            return None
        return f"got groups of {found} rows, expected {list(self.group_rows)}"

    def groups(self, state: dict[str, Tensor]) -> Tensor:
        """Return the group of each row, shape (rows,)."""
        if "groups" in state:
            return state["groups"]
        return unpack_codes(state["row_groups"], self._group_bits, sum(self.group_rows))

    def _rows_of_groups(self, state: dict[str, Tensor]) -> list[Tensor]:
        """Return the indices of the rows of each group."""
        groups = self.groups(state)
        return [torch.nonzero(groups == group).view(-1) for group in range(len(self.parts))]

    def state_of_rows(self, state, rows):
        own = {**state, "groups": select_rows(self.groups(state), rows)}
        return {**own, "row_scale": state["row_scale"][rows]} if self.row_scale else own

    # ---- state -----------------------------------------------------------------------------------

    def split_state(self, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return a state for each group: its codebook, a view, and the scales of all rows."""
        specs = [part.state_spec(1, 1) for part in self.parts]
        states: list[dict[str, Tensor]] = [{} for _ in specs]
        for key in filter(state.__contains__, specs[0]):
            shapes = [spec[key][0] for spec in specs]
            values = [state[key]] * len(specs)
            if key != "row_scale":
                flat = state[key].split([math.prod(shape) for shape in shapes])
                values = [each.view(shape) for each, shape in zip(flat, shapes, strict=True)]
            for own, value in zip(states, values, strict=True):
                own[key] = value
        return states

    def join_states(self, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of all groups, one after the other, without scales of rows."""
        keys = [key for key in states[0] if key != "row_scale"]
        return {key: torch.cat([own[key].reshape(-1) for own in states]) for key in keys}

    def state_spec(self, rows, columns):
        specs = [part.state_spec(rows, columns) for part in self.parts]
        spec = {}
        for key, (shape, dtype) in specs[0].items():
            sizes = (math.prod(own[key][0]) for own in specs)
            spec[key] = (shape if key == "row_scale" else (sum(sizes),), dtype)
        return spec | {"row_groups": ((-(-rows * self._group_bits // 8),), torch.uint8)}

    def to_storage(self, state):
        states = zip(self.parts, self.split_state(state), strict=True)
        stored = [part.to_storage(own) for part, own in states]
        return {**state, **stored[0], **self.join_states(stored)}

    def from_storage(self, state):
        states = zip(self.parts, self.split_state(state), strict=True)
        return {**state, **self.join_states([part.from_storage(own) for part, own in states])}

    # ---- fit, encode, decode ---------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, matrix, *, seed=0, init=None, importance=None):
        state = dict(init or {})
        if "row_groups" not in state:
            state["row_groups"] = self.row_groups_of(matrix.new_zeros(len(matrix)))
        starts = self.split_state(state) if "codebook" in state else [None] * len(self.parts)
        states, scales = [], matrix.new_zeros(len(matrix), 1)
        for part, rows, start in zip(self.parts, self._rows_of_groups(state), starts, strict=True):
            weights = _of_rows(importance, rows)
            states.append(part.fit(matrix[rows], seed=seed, init=start, importance=weights))
            if self.row_scale:
                scales[rows] = states[-1]["row_scale"]
        fitted = {**self.join_states(states), "row_groups": state["row_groups"]}
        return {**fitted, "row_scale": scales} if self.row_scale else fitted

    def encode(self, matrix, state, importance=None):
        width = self._codes_per_row(matrix.shape[1])
        dtype = code_dtype(self.code_bits)
        codes = torch.zeros(len(matrix), max(width), dtype=dtype, device=matrix.device)
        groups = zip(
            self.parts, self._rows_of_groups(state), self.split_state(state), width, strict=True
        )
        for part, rows, own, n_codes in groups:
            own = part.state_of_rows(own, rows)
            codes[rows, :n_codes] = part.encode(matrix[rows], own, _of_rows(importance, rows))
        return codes

    def decode(self, codes, state):
        # Shapes must not depend on the groups, for torch.compile and ONNX: all rows are decoded as
        # each group stores them.
        groups = self.groups(state)
        matrix = None
        for group, (part, own) in enumerate(zip(self.parts, self.split_state(state), strict=True)):
            n_codes = codes.shape[1] * min(self.block_sizes) // part.block_size
            decoded = part.decode(codes[:, :n_codes], own)
            is_own = (groups == group)[:, None]
            matrix = decoded if matrix is None else torch.where(is_own, decoded, matrix)
        return matrix

    def _codes_per_row(self, columns: int) -> list[int]:
        return [part.n_codes(1, columns) for part in self.parts]

    def split(self, codes: Tensor, state: dict[str, Tensor]) -> Iterator[tuple]:
        """Yield quantizer, rows, codes and state of each group; the state has all rows' scales."""
        columns = codes.shape[1] * min(self.block_sizes) // self.n_codebooks
        rows_of = self._rows_of_groups(state)
        for part, rows, own in zip(self.parts, rows_of, self.split_state(state), strict=True):
            yield part, rows, codes[rows, : part.n_codes(1, columns)], own

    def block_counts(self, codes: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return |J_c|, the number of blocks of each centroid, the first group's first."""
        return torch.cat([p.block_counts(c, state) for p, _, c, _ in self.split(codes, state)])

    def averaging(self, state, counts):
        """As in :class:`ProductQuantizer`."""
        if not (records_gradients() and state["codebook"].requires_grad):
            return state
        widths = [part.block_size for part in self.parts for _ in range(part.codebook_size)]
        blocks = counts().repeat_interleave(torch.tensor(widths, device=state["codebook"].device))
        return {**state, "codebook": AverageOverBlocks.apply(state["codebook"], blocks)}

    # ---- packed codes ----------------------------------------------------------------------------

    def n_codes(self, rows, columns):
        """Return the number of codes of the table; ``rows`` is its number of rows."""
        parts = zip(self.parts, self.group_rows, strict=True)
        return sum(part.n_codes(own, columns) for part, own in parts)

    def rows_are_aligned(self, columns):
        return all(part.rows_are_aligned(columns) for part in self.parts)

    def indices_shape(self, rows, columns):
        return (-(-self.n_codes(rows, columns) * self.code_bits // 8),)

    def pack(self, codes, state):
        own = torch.cat([own.reshape(-1) for _, _, own, _ in self.split(codes, state)])
        return pack_codes(own, self.code_bits)

    def unpack(self, packed, state, shape, rows=None):
        n_rows, columns = shape
        width, aligned = self._codes_per_row(columns), self.rows_are_aligned(columns)
        groups, chosen = self.groups(state), slice(None) if rows is None else rows
        if not aligned:
            packed = unpack_codes(packed, self.code_bits, self.n_codes(n_rows, columns))
        bits, codes, start = self.code_bits if aligned else 8, None, 0
        for group, (size, n_codes) in enumerate(zip(self.group_rows, width, strict=True)):
            end = start + size * n_codes * bits // 8
            own = groups == group
            # For rows of other groups, any row.
            places = select_rows(own.cumsum(0).sub(1).clamp(min=0), chosen)
            found = packed[start:end].view(size, -1).index_select(0, places)
            if aligned:
                found = unpack_codes(found.view(-1), self.code_bits, places.shape[0] * n_codes)
            found = F.pad(found.view(-1, n_codes), (0, max(width) - n_codes))
            is_own = select_rows(own, chosen)[:, None]
            codes = found if codes is None else torch.where(is_own, found, codes)
            start = end
        return codes

    # ---- checks ----------------------------------------------------------------------------------

    def check(self, rows, columns):
        if len(self.group_rows) != len(self.block_sizes) or sum(self.group_rows) != rows:
            return (
                f"group_rows={list(self.group_rows)} and block_sizes={list(self.block_sizes)} do "
                f"not divide its {rows} rows into groups"
            )
        for part, own in zip(self.parts, self.group_rows, strict=True):
            if reason := part.check(own, columns):
                return f"its group of {own} rows: {reason}"
        return None

    def for_values(self, matrix):
        return replace(self, codebook_bits=self.parts[0].for_values(matrix).codebook_bits)

    def check_values(self, matrix):
        return self.parts[0].check_values(matrix)

    def to_dict(self):
        values = super().to_dict()
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _of_rows(importance: Tensor | None, rows: Tensor) -> Tensor | None:
    return importance if importance is None or len(importance) == 1 else importance[rows]
