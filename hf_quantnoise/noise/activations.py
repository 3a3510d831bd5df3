"""Fixed-point noise on activations during training (section 7.7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compat import in_backward
from ..quantizers import FixedPointQuantizer
from ..quantizers.fixed_point import round_activations
from ..quantizers.observers import extremes


@dataclass(eq=False)
class ActivationNoise:
    """Rounds the input of one layer to N bits, within the range seen in the first forwards.

    A forward never communicates with other ranks, because LayerDrop or a router may skip the layer
    on some of them. ``QuantNoiseState.share_ranges`` synchronizes the ranges between forwards.
    """

    bits: int
    calibration: int  # number of forwards that only observe the range
    seen: int = 0  # number of forwards observed so far
    range: tuple[Tensor, Tensor] | None = None  # extremes of those forwards, scalars
    # Forwards that gradient checkpointing may still recompute: the observed ones, and the rounded
    # ones after the last observed one.
    _pending_observed: int = 0
    _pending_rounded: int = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the inputs, rounded once calibration is over; shape and dtype stay.

        Empty inputs are not counted: experts and adapters get them if a batch has no rows for them.
        """
        if not inputs.numel():
            return inputs
        if self.range is not None and self.range[0].device != inputs.device:
            low, high = self.range
            self.range = low.to(inputs.device), high.to(inputs.device)
        # A compiled graph is recomputed inside the compiler, without this call.
        if not torch.compiler.is_compiling() and in_backward():
            only_observed = self._recomputes_observed()
        else:
            only_observed = self._observe(inputs)
        if only_observed or self.range is None:
            return inputs
        state = FixedPointQuantizer(bits=self.bits).state_of_range(*self.range)
        return round_activations(inputs, state, self.bits)

    def _observe(self, inputs: Tensor) -> bool:
        """Count a forward, widen the range, and return whether it is only observed."""
        only_observed = self.seen < self.calibration
        if only_observed:
            with torch.no_grad():
                self.range = extremes(inputs.detach().float(), self.range)
            self.seen += 1
        if not torch.compiler.is_compiling():
            self._pending_observed += only_observed
            self._pending_rounded += not only_observed and self._pending_observed > 0
        return only_observed

    def _recomputes_observed(self) -> bool:
        """Return whether the recomputed forward was only observed; the last comes back first."""
        if self._pending_rounded:
            self._pending_rounded -= 1
            return False
        only_observed = self._pending_observed > 0
        self._pending_observed -= only_observed
        return only_observed

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, scalars; setting them restores the noise."""
        zero = torch.zeros((), device="cpu")
        low, high = (zero, zero.clone()) if self.range is None else self.range
        return {"low": low, "high": high, "seen": torch.tensor(self.seen, device="cpu")}

    @state.setter
    def state(self, tensors: dict[str, Tensor]) -> None:
        self.seen = int(tensors["seen"])
        self.range = (tensors["low"], tensors["high"]) if self.seen else None
