"""Fixed-point scalar quantization (section 3.1): N-bit integers with a scale and a zero point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..configuration import OBSERVERS, QUANTIZERS
from ..configuration.checks import boolean, integer, one_of
from ..layer_types import records_gradients
from .base import CHUNK_ELEMENTS, Quantizer, require_finite, with_known_signature
from .observers import Range, extremes
from .packing import code_dtype

SMALLEST_HALF = 2.0**-24  # the smallest positive float16


@QUANTIZERS.register("int")
@dataclass(frozen=True)
class FixedPointQuantizer(Quantizer):
    """Each element is stored as round(w / s + z), clamped to 0 .. 2^N - 1 (Eq. 2).

    State: ``scale`` s and ``zero_point`` z in floating point, with

        s = (max W - min W) / (2^N - 1),  z = -round(min W / s),

    scalars, or of shape (rows, 1) if the observer is per channel. Eq. 2 writes z without the
    minus. (round(w / s + z) - z) s is the same for either sign, as z is an integer, and with the
    minus the codes count from 0.
    """

    # N
    bits: Annotated[int, integer(1, 8)] = 8
    # how the range (min W, max W) is found (observers.py)
    observer: Annotated[str, one_of(OBSERVERS)] = "minmax"
    # whether s and z are parameters; a step of an optimizer may be larger than s
    trained: Annotated[bool, boolean] = True

    scheme: ClassVar[str] = "int"
    block_size: ClassVar[int] = 1
    state_names: ClassVar[frozenset[str]] = frozenset({"scale", "zero_point"})

    @property
    def not_trained(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.trained else self.state_names

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def short_name(self) -> str:
        return f"int{self.bits}" + ("" if self.observer == "minmax" else f" {self.observer}")

    def fit(self, matrix, *, seed=0, init=None, importance=None):
        return self.fit_running(matrix)[0]

    def fit_running(
        self, matrix: Tensor, running: Range | None = None
    ) -> tuple[dict[str, Tensor], Range]:
        """Fit like :meth:`fit`; return the state, and the extremes of the matrix, scalars.

        With a running observer the extremes are those of all matrices so far: ``running``, as
        returned by the last call, widened by this matrix.
        """
        require_finite(matrix)
        observer, values = OBSERVERS[self.observer], matrix.float()
        full_range = extremes(values, running if observer.running else None)
        states = []
        for low, high in observer.candidates(values, self.bits, full_range):
            state = self.state_of_range(low, high, matrix.dtype)
            states.append({key: value.to(matrix.dtype) for key, value in state.items()})
        best, *others = states
        for state in others:
            better = self._errors(values, state) < self._errors(values, best)
            best = {key: torch.where(better, state[key], best[key]) for key in best}
        return best, full_range

    def _errors(self, matrix: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the squared error of each row, (rows, 1), or in total if the state is scalar."""
        parts = []
        step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
        for start in range(0, len(matrix), step):
            rows = slice(start, start + step)
            part = matrix[rows]
            decoded = self.quantize(part, self.state_of_rows(state, rows))
            parts.append((decoded - part).double().square().sum(1, keepdim=True))
        errors = torch.cat(parts)
        return errors if state["scale"].dim() else errors.sum()

    def state_of_range(
        self, low: Tensor, high: Tensor, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the state whose 2^N levels span a range, with a scale above 0 also in ``dtype``.

        A float16 scale of a tiny range would be 0. With the smallest float16 value as the scale,
        all values in such a range are levels.
        """
        scale = (high - low) / (2**self.bits - 1)
        # A constant matrix has an empty range; with its magnitude as the scale it is exact.
        constant = torch.where(low == 0, torch.ones_like(low), low.abs())
        scale = torch.where(scale > 0, scale, constant)
        if dtype == torch.float16:  # bfloat16 has the exponents of float32
            scale = scale.clamp(min=SMALLEST_HALF)
        return {"scale": scale, "zero_point": -torch.round(low / scale)}

    def check_values(self, matrix):
        if reason := super().check_values(matrix):
            return reason
        per_channel = OBSERVERS[self.observer].per_channel
        low, high = torch.aminmax(matrix, dim=1) if per_channel else torch.aminmax(matrix)
        state = self.state_of_range(low.float(), high.float())
        scale, zero_point = (state[key].to(matrix.dtype) for key in ("scale", "zero_point"))
        if bool((scale > 0).any()) and bool(torch.isfinite(zero_point).all()):
            return None
        return (
            f"its values from {float(low.min()):g} to {float(high.max()):g} need a scale or zero "
            f"point outside of {str(matrix.dtype).removeprefix('torch.')}; load the model with "
            "dtype=torch.float32"
        )

    def state_of_rows(self, state, rows):
        if not OBSERVERS[self.observer].per_channel:
            return state
        return {key: value[rows] for key, value in state.items()}

    def levels(self, values: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return round(w / s + z), clamped, in float32; NaN stays NaN."""
        scale, zero_point = state["scale"].float(), state["zero_point"].float()
        return values.float().div(scale).add_(zero_point).round_().clamp_(0, 2**self.bits - 1)

    def encode(self, matrix, state, importance=None):
        codes = torch.empty(matrix.shape, dtype=code_dtype(self.bits), device=matrix.device)
        step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
        for start in range(0, len(matrix), step):  # one float32 chunk of memory
            rows = slice(start, start + step)
            codes[rows] = self.levels(matrix[rows], self.state_of_rows(state, rows))
        return codes

    def quantize(self, matrix, state):
        return self.decode(self.levels(matrix, state), state)  # without a conversion to integers

    def decode(self, codes, state):
        scale, zero_point = state["scale"], state["zero_point"]
        values = codes.to(scale.dtype)
        if records_gradients() or values is codes:
            return (values - zero_point) * scale
        return values.sub_(zero_point).mul_(scale)  # one matrix of memory, and twice as fast

    def state_spec(self, rows, columns):
        shape = (rows, 1) if OBSERVERS[self.observer].per_channel else ()
        return {"scale": (shape, torch.float32), "zero_point": (shape, torch.float32)}


@with_known_signature
class _RoundWithin(torch.autograd.Function):
    """Rounded values forward; identity backward within the range, zero outside it."""

    @staticmethod
    def forward(values: Tensor, rounded: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        values, _, low, high = inputs
        ctx.save_for_backward((values >= low) & (values <= high))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


def round_activations(values: Tensor, state: dict[str, Tensor], bits: int) -> Tensor:
    """Round activations to N-bit integers (Eq. 2, section 7.7); shape and dtype stay.

    ``state`` holds the scalars ``scale`` and ``zero_point``. The gradient is straight-through
    within the range, and zero outside it.
    """
    quantizer = FixedPointQuantizer(bits=bits)
    state = {key: value.float() for key, value in state.items()}
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        rounded = quantizer.decode(quantizer.levels(values, state), state).to(values.dtype)
    if not (records_gradients() and values.requires_grad):
        return rounded
    ends = (torch.tensor(level, device="cpu") for level in (0, 2**bits - 1))
    low, high = (quantizer.decode(end, state) for end in ends)
    return _RoundWithin.apply(values, rounded, low, high)
