"""Fixed-point activations while training (section 7.7)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import is_distributed
from ..quantizers import FixedPointQuantizer
from ..quantizers.fixed_point import round_activations
from ..quantizers.observers import extremes


class ActivationNoise:
    """Rounds what enters one layer to N bits, between the extremes of the first forwards.

    Args:
        bits: N.
        calibration: number of forwards that are only watched.
    """

    def __init__(self, bits: int, calibration: int) -> None:
        self.bits = bits
        self.calibration = calibration
        self.seen = 0
        self.range: tuple[Tensor, Tensor] | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The inputs, rounded once calibration is over; shape and dtype stay."""
        if self.seen < self.calibration:
            with torch.no_grad():
                self.range = _of_all_ranks(extremes(inputs.detach().float(), self._on(inputs)))
            self.seen += 1
            return inputs
        state = FixedPointQuantizer(bits=self.bits).state_of_range(*self._on(inputs))
        return round_activations(inputs, state, self.bits)

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


def _of_all_ranks(extreme: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The extremes over the batches of all ranks."""
    if not is_distributed():
        return extreme
    both = torch.stack([-extreme[0], extreme[1]])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return -both[0], both[1]
