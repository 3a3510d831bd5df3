"""Decode a slice of the weight, and multiply. The path for everything, on any device."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .case import Case, bias_of, in_slices


def is_available() -> bool:
    """Return True: it needs nothing."""
    return True


def supports(layer: Any, case: Case) -> bool:
    """Return True: it takes any layer and any inputs."""
    return True


def run(layer: Any, inputs: Tensor, case: Case) -> Tensor:
    """Return the outputs, computed in the dtype of the inputs, or of autocast."""

    def part(rows: slice) -> Tensor:
        return F.linear(inputs, layer.decode_rows(rows), bias_of(layer, rows))

    return in_slices(layer, case, inputs.element_size(), part)
