"""Fixed-point scalar quantization (section 3.1): N-bit integers with a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..registry import Registry
from .base import QUANTIZERS, Quantizer, require_finite
from .packing import code_dtype

OBSERVERS: Registry = Registry("observer")


@OBSERVERS.register("minmax")
def minmax(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The range of the weights themselves: (min W, max W), scalars."""
    return torch.aminmax(matrix)


@QUANTIZERS.register("int")
@dataclass(frozen=True)
class FixedPointQuantizer(Quantizer):
    """Each weight is stored as round(w / s + z), clamped to 0 .. 2^N - 1 (Eq. 2).

    State: ``scale`` s and ``zero_point`` z, scalars in floating point, with

        s = (max W - min W) / (2^N - 1),  z = -round(min W / s).

    Eq. 2 writes z without the minus; c = (round(w / s + z) - z) s is the same for either sign, as z
    is an integer, and with the minus the codes count from 0.

    Args:
        bits: N, 1 to 8.
        observer: how the range is found.
    """

    bits: int = 8
    observer: str = "minmax"

    scheme: ClassVar[str] = "int"
    block_size: ClassVar[int] = 1

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def short_name(self) -> str:
        return f"int{self.bits}"

    def fit(self, matrix, *, seed=0, init=None):
        require_finite(matrix)
        low, high = OBSERVERS[self.observer](matrix.float())
        scale = (high - low) / (2**self.bits - 1)
        # A constant matrix has no range: with its own magnitude as scale it is reproduced exactly.
        constant = torch.where(low == 0, torch.ones_like(low), low.abs())
        scale = torch.where(scale > 0, scale, constant)
        zero_point = -torch.round(low / scale)
        return {"scale": scale.to(matrix.dtype), "zero_point": zero_point.to(matrix.dtype)}

    def encode(self, matrix, state):
        scale, zero_point = state["scale"].float(), state["zero_point"].float()
        codes = matrix.float().div(scale).add_(zero_point).round_().clamp_(0, 2**self.bits - 1)
        return codes.to(code_dtype(self.bits))

    def decode(self, codes, state):
        scale = state["scale"]
        return (codes.to(scale.dtype) - state["zero_point"]) * scale

    def state_spec(self, rows, columns):
        return {"scale": ((), torch.float32), "zero_point": ((), torch.float32)}

    def check(self, rows, columns):
        return None
