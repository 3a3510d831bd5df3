"""The interface of every quantizer.

A quantizer is a frozen dataclass of hyperparameters (it goes into ``config.json``); what it fits to
a weight is a dict of float tensors, its state (it goes into the checkpoint beside the codes).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..registry import Registry

QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer")


class Quantizer(ABC):
    """Stores a matrix (rows, columns) as one code (or two) per block, and a state shared by all.

    Attributes:
        scheme: name in a plan.
        block_size: numbers per block.
        code_bits: bits per code.
        codes_per_block: codes that stand side by side for a block.
        short_name: for tables, e.g. ``"pq 256x4"``.
    """

    scheme: ClassVar[str]
    block_size: int
    codes_per_block: ClassVar[int] = 1

    @property
    @abstractmethod
    def code_bits(self) -> int: ...

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
        """Fits the state to a matrix (rows, columns).

        Args:
            matrix: the weight.
            seed: seed of whatever is random in the fit.
            init: an earlier state to start from.
            importance: weight above 0 of each number's squared error, of a shape that broadcasts to
                that of the matrix (``modeling/importance.py``); None weighs all alike. A quantizer
                that rounds number by number has no use for it.

        Raises:
            ValueError: if the matrix has entries that are not finite.
        """

    @abstractmethod
    def encode(
        self, matrix: Tensor, state: dict[str, Tensor], importance: Tensor | None = None
    ) -> Tensor:
        """The code of each block, (rows, columns / block_size): uint8, int32 above 8 bits; the one
        of the lowest error, weighted as in :meth:`fit`. With several codes per block so many
        times the columns, those of a block side by side."""

    @abstractmethod
    def decode(self, codes: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Codes (rows, columns / block_size) -> matrix (rows, columns); differentiable in state."""

    @abstractmethod
    def state_spec(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and stored dtype of each tensor of the state, for a (rows, columns) matrix."""

    @abstractmethod
    def check(self, rows: int, columns: int) -> str | None:
        """Why a (rows, columns) matrix cannot be stored so; None where it can."""

    def state_of_rows(self, state: dict[str, Tensor], rows: Tensor | slice) -> dict[str, Tensor]:
        """The part of a state that decodes some rows; the state itself where rows share it."""
        return state

    @property
    def not_trained(self) -> set[str]:
        """Keys of the state that no gradient reaches."""
        return set()

    def to_storage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a state as it is written to a file: in the dtypes of :meth:`state_spec` if those
        are smaller."""
        spec = self.state_spec(1, 1)
        return {
            key: tensor.to(dtype) if dtype.itemsize < tensor.element_size() else tensor
            for key, tensor in state.items()
            for _, dtype in [spec[key]]
        }

    @property
    def encodes_state(self) -> bool:
        """Whether files hold codes instead of the values of the state."""
        return False

    def from_storage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state in memory of a state that was read from a file."""
        return state

    def quantize(self, matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
        """decode(encode(matrix)): the matrix as it would be read back."""
        return self.decode(self.encode(matrix, state), state)

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes on disk: the packed codes and the state."""
        n_codes = rows * columns // self.block_size * self.codes_per_block
        codes = -(-n_codes * self.code_bits // 8)
        state = sum(
            math.prod(shape) * torch.empty((), dtype=dtype).element_size()
            for shape, dtype in self.state_spec(rows, columns).values()
        )
        return codes + state

    def to_dict(self) -> dict[str, Any]:
        """JSON form; :func:`quantizer_from_dict` is the inverse."""
        return {"scheme": self.scheme, **asdict(self)}


def quantizer_from_dict(values: dict[str, Any]) -> Quantizer:
    """The quantizer of a plan's entry.

    Raises:
        ValueError: if the scheme is unknown or a field is not one of its own.
    """
    values = dict(values)
    target = QUANTIZERS[values.pop("scheme", None)]
    try:
        return target(**values)
    except TypeError as error:
        raise ValueError(f"quantizer {target.scheme!r}: {error}") from None


def require_finite(matrix: Tensor) -> None:
    """Raises ValueError where a matrix holds NaN or infinity, saying how many."""
    finite = torch.isfinite(matrix)
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(
            f"the weight has {bad} entries of {matrix.numel()} that are NaN or infinite; "
            "the training diverged, or the checkpoint is damaged"
        )
