"""Fixed-point activations while training (section 7.7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import is_distributed, max_over_ranks, widest_over_ranks
from ..quantizers import FixedPointQuantizer
from ..quantizers.fixed_point import round_activations
from ..quantizers.observers import extremes
from .block_mask import in_backward


class ActivationNoise:
    """Rounds what enters one layer to N bits, between the extremes of the first forwards.

    A forward exchanges nothing with other ranks: layer dropping, or a router, may leave the layer
    out on one of them. :func:`share_ranges` does, between the forwards.

    Args:
        bits: N.
        calibration: number of forwards that are only watched.

    Attributes:
        seen: how many have been.
        range: their extremes, float32 scalars; None before the first.
    """

    def __init__(self, bits: int, calibration: int) -> None:
        self.bits = bits
        self.calibration = calibration
        self.seen = 0
        self.range: tuple[Tensor, Tensor] | None = None
        # Forwards that gradient checkpointing may be about to recompute: those only watched, and
        # those rounded since the last of them.
        self._watched = self._rounded = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        """The inputs, rounded once calibration is over; shape and dtype stay."""
        # A compiler recomputes inside of its graphs, without this call.
        if not torch.compiler.is_compiling() and in_backward():
            is_watched = self._was_watched()
        else:
            is_watched = self._watch(inputs)
        if is_watched:
            return inputs
        state = FixedPointQuantizer(bits=self.bits).state_of_range(*self._on(inputs))
        return round_activations(inputs, state, self.bits)

    def _watch(self, inputs: Tensor) -> bool:
        """Takes a forward into account; whether it is only watched."""
        is_watched = self.seen < self.calibration
        if is_watched:
            with torch.no_grad():
                self.range = extremes(inputs.detach().float(), self._on(inputs))
            self.seen += 1
        if not torch.compiler.is_compiling():
            self._watched += is_watched
            self._rounded += not is_watched and self._watched > 0
        return is_watched

    def _was_watched(self) -> bool:
        """Whether the forward that is recomputed was only watched; they come last one first."""
        if self._rounded:
            self._rounded -= 1
            return False
        was_watched = self._watched > 0
        self._watched -= was_watched
        return was_watched

    def _on(self, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.range is not None and self.range[0].device != inputs.device:
            self.range = tuple(value.to(inputs.device) for value in self.range)
        return self.range

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; ``load_state_dict`` is the inverse."""
        low, high = self.range if self.range is not None else (torch.zeros(()), torch.zeros(()))
        return {"low": low, "high": high, "seen": torch.tensor(self.seen)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.seen = int(tensors["seen"])
        self.range = (tensors["low"], tensors["high"]) if self.seen else None


def share_ranges(noises: Sequence[ActivationNoise]) -> bool:
    """Gives each layer the extremes over the batches of all ranks, and the forwards of the rank
    that has watched most. On all ranks of a distributed run, between forwards.

    Returns:
        Whether calibration is over for all layers, so that there is nothing more to share; the
        same on every rank.
    """
    if is_distributed() and noises:
        _take_widest(noises)
    return all(noise.seen >= noise.calibration for noise in noises)


def _take_widest(noises: Sequence[ActivationNoise]) -> None:
    known = [noise.range[0].device for noise in noises if noise.range is not None]
    device = known[0] if known else torch.device("cpu")
    ranges = widest_over_ranks([noise.range for noise in noises], device)
    seen = max_over_ranks(torch.tensor([noise.seen for noise in noises], device=device))
    for noise, widest, count in zip(noises, ranges, seen.tolist(), strict=True):
        noise.seen, noise.range = count, widest if count else None
