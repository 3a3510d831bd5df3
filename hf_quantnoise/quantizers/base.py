"""The interface of every quantizer.

A quantizer is a frozen dataclass of hyperparameters, stored in ``config.json``. Fitting it to a
weight gives its state, a dict of float tensors that is stored in the checkpoint beside the codes.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .packing import pack_codes, unpack_codes

# Range of the largest magnitude of a weight that is quantized. Fits sum squares in float32, which
# ends at 3.4e38 and 1.2e-38; real weights are far from both.
MAGNITUDES = (1e-16, 1e16)
# Elements that a computation on a matrix works on at a time, so that its temporaries stay in cache.
CHUNK_ELEMENTS = 2**17


def with_known_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Keep the signature of ``forward``: ``apply`` inspects it in each call, which takes 15 us.

    It does so for functions with ``setup_context``, which ``torch.func`` requires.
    """
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


@with_known_signature
class StraightThrough(torch.autograd.Function):
    """Other values forward, identity backward (the STE of section 4.1). Saves nothing."""

    @staticmethod
    def forward(tensor: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class Quantizer(ABC):
    """Stores a matrix (rows, columns) as integer codes per block, and a state.

    The contract: ``state = fit(matrix)`` estimates the parameters (codebook or scales),
    ``codes = encode(matrix, state)`` picks the code of lowest error for each block, and
    ``decode(codes, state)`` reconstructs the matrix. Encoding a decoded matrix again changes
    nothing (additive quantization may find a lower error).

    Attributes:
        scheme: name in a plan.
        block_size: elements per block.
        code_bits: bits per code.
        codes_per_block: number of codes of a block, adjacent in the codes of its row.
        n_values: number of valid codes, from 0.
        state_names: all keys that a state can have.
        positive: keys of state tensors whose values are above 0. No tensor that is trained is one:
            training can make a scale negative.
        not_trained: keys of state tensors that get no gradient.
        integers: keys of state tensors that are integers in memory, too.
        short_name: for tables, e.g. ``"pq 256x4"``.
    """

    scheme: ClassVar[str]
    block_size: int
    codes_per_block: ClassVar[int] = 1
    state_names: ClassVar[frozenset[str]] = frozenset()
    positive: ClassVar[frozenset[str]] = frozenset()
    not_trained: ClassVar[frozenset[str]] = frozenset()
    integers: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def code_bits(self) -> int: ...

    @property
    def n_values(self) -> int:
        return 2**self.code_bits

    @property
    def has_codebook(self) -> bool:
        """Whether the state has centroids, as ``codebook``, and codes are assigned to them."""
        return "codebook" in self.state_names

    @property
    @abstractmethod
    def short_name(self) -> str: ...

    @abstractmethod
    def fit(
        self,
        matrix: Tensor,
        *,
        seed: int = 0,
        init: dict[str, Tensor] | None = None,
        importance: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Fit the state to a weight matrix (rows, columns).

        Args:
            seed: seed of all randomness in the fit.
            init: an earlier state to start from.
            importance: positive weight of each element's squared error, broadcastable to the matrix
                (``modeling/importance.py``); None weighs all alike. Quantizers that round each
                element separately ignore it.

        Raises:
            ValueError: if the matrix has NaN or infinite entries.
        """

    @abstractmethod
    def encode(
        self, matrix: Tensor, state: dict[str, Tensor], importance: Tensor | None = None
    ) -> Tensor:
        """Return the codes of lowest error, weighted as in :meth:`fit`.

        Returns:
            Shape (rows, codes per row); uint8, or int32 above 8 bits.
        """

    @abstractmethod
    def decode(self, codes: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the matrix (rows, columns) of some codes; differentiable in the state."""

    @abstractmethod
    def state_spec(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and stored dtype of each state tensor, for a (rows, columns) matrix."""

    def check(self, rows: int, columns: int) -> str | None:
        """Return why a (rows, columns) matrix cannot be quantized, or None if it can."""
        return None

    def check_values(self, matrix: Tensor) -> str | None:
        """Return why the values of a finite matrix cannot be quantized, or None if they can."""
        largest = float(largest_magnitude(matrix))
        low, high = MAGNITUDES
        if largest and not low <= largest <= high:
            return (
                f"its largest magnitude is {largest:.3g}, expected {low:g} to {high:g} (squares "
                "must fit into float32); rescale the weight"
            )
        return None

    def for_values(self, matrix: Tensor) -> Quantizer:
        """Return this quantizer, or one with centroids of higher precision if a matrix needs it."""
        return self

    def state_of_rows(self, state: dict[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
        """Return the part of a state that decodes some rows; the state itself if rows share it."""
        return state

    def averaging(
        self, state: dict[str, Tensor], counts: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Return a state that decodes to the same, with averaged gradients; see section 3.2.

        The state itself, for quantizers without centroids.
        """
        return state

    def to_storage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state to its form in a file: the dtypes of the spec, if they are smaller."""
        dtypes = {key: dtype for key, (_, dtype) in self.state_spec(1, 1).items()}
        return {
            key: tensor.to(dtypes[key]) if dtypes[key].itemsize < tensor.element_size() else tensor
            for key, tensor in state.items()
        }

    @property
    def encodes_state(self) -> bool:
        """Whether files hold codes for state values, which :meth:`from_storage` decodes."""
        spec = self.state_spec(1, 1).items()
        return any(
            not dtype.is_floating_point for key, (_, dtype) in spec if key not in self.integers
        )

    def from_storage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state read from a file to its working form."""
        return state

    def quantize(self, matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return decode(encode(matrix)): the matrix as it would be read back."""
        return self.decode(self.encode(matrix, state), state)

    # ---- packed codes ----------------------------------------------------------------------------

    def n_codes(self, rows: int, columns: int) -> int:
        """Return the number of codes of a (rows, columns) matrix."""
        return rows * columns // self.block_size * self.codes_per_block

    def rows_are_aligned(self, columns: int) -> bool:
        """Return whether each row of packed codes begins on a byte, so it can be read alone."""
        return self.n_codes(1, columns) * self.code_bits % 8 == 0

    def indices_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the packed codes: (rows, bytes per row) if aligned, else (bytes,)."""
        n_bytes = -(-self.n_codes(rows, columns) * self.code_bits // 8)
        return (rows, n_bytes // rows) if self.rows_are_aligned(columns) else (n_bytes,)

    def pack(self, codes: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the codes of a matrix packed to bytes, one-dimensional."""
        return pack_codes(codes.reshape(-1), self.code_bits)

    def unpack(
        self,
        packed: Tensor,
        state: dict[str, Tensor],
        shape: tuple[int, int],
        rows: Tensor | slice | None = None,
    ) -> Tensor:
        """Return the codes of a matrix of some shape, or of some of its rows, from packed bytes.

        If rows are aligned, only the bytes of these rows are read.
        """
        n_rows, columns = shape
        if rows is not None and self.rows_are_aligned(columns):
            packed = select_rows(packed, rows)
            n_rows, rows = packed.shape[0], None
        per_row = self.n_codes(1, columns)
        codes = unpack_codes(packed.reshape(-1), self.code_bits, n_rows * per_row)
        codes = codes.view(n_rows, per_row)
        return codes if rows is None else codes[rows]

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes on disk of the packed codes and the state."""
        codes = math.prod(self.indices_shape(rows, columns))
        spec = self.state_spec(rows, columns).values()
        return codes + sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; :func:`quantizer_from_dict` is the inverse."""
        return {"scheme": self.scheme, **vars(self)}


def select_rows(matrix: Tensor, rows: Tensor | slice) -> Tensor:
    """Return some rows; IndexError for negative ones, as any table should."""
    return matrix[rows] if isinstance(rows, slice) else matrix.index_select(0, rows)


def largest_magnitude(matrix: Tensor) -> Tensor:
    """Return max |w| in the matrix's dtype, without a copy of the matrix."""
    low, high = torch.aminmax(matrix.detach())
    return torch.maximum(-low, high)


def sum_of_squares(matrix: Tensor, other: Tensor | None = None) -> float:
    """Return ||matrix - other||^2 in float64; ``other`` is zero by default."""
    total, step = 0.0, max(1, CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step].double()
        if other is not None:
            part = part - other[start : start + step].double()
        total += float(part.square().sum())
    return total


def require_finite(matrix: Tensor, name: str = "weight") -> None:
    """Raise ValueError if a matrix has NaN or infinite entries, with their number."""
    # One reduction for nearly all matrices: a sum is finite only if all terms are.
    if bool(torch.isfinite(matrix.sum(dtype=torch.float32))):
        return
    finite = torch.isfinite(matrix)
    if not finite.all():
        raise ValueError(
            f"invalid {name}: {int((~finite).sum())} of {matrix.numel()} entries are NaN or "
            "infinite; check the training for divergence, or download the checkpoint again"
        )
