"""Kernels: ways to multiply inputs with the weight of a packed layer, without gradients.

There is one file per kernel; ``case.py`` has their interface. A layer's inputs go to the first
kernel of :data:`KERNELS` that is available and supports them:

| kernel | device | dtype of products | inputs | weight |
|---|---|---|---|---|
| ``int8`` | CPU with VNNI | int8 | any number, of 8 bits or fewer | intN, or 8-bit centroids |
| ``tables`` | CPU | float32 | up to 64 | blocks of 8 or more, rows at least 5 times the centroids |
| ``autocast`` | any | that of autocast | any number | one codebook, no scale per row |
| ``decode`` | any | that of inputs or autocast | any | any |

``int8``, ``tables`` and ``decode`` give the same values but for the rounding of sums.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...layer_types import records_gradients
from . import autocast, decode, dense, int8, tables
from .case import Case, Kernel, is_graph

__all__ = ["KERNELS", "Case", "Kernel", "kernel_for", "rounds_inputs", "run_kernel"]

KERNELS: MappingProxyType[str, Kernel] = MappingProxyType(
    {"int8": int8, "tables": tables, "autocast": autocast, "decode": decode}
)


def kernel_for(layer: Any, case: Case) -> str:
    """Return the name of the kernel that a layer uses; ``layer.kernels`` are those it may use."""
    if is_graph():
        return "decode"
    for name, kernel in KERNELS.items():
        if name in layer.kernels and kernel.is_available() and kernel.supports(layer, case):
            return name
    return "decode"


def run_kernel(layer: Any, inputs: Tensor) -> Tensor:
    """Return ``inputs @ matrix.T + bias`` of a packed layer."""
    if layer.dense_form is not None:
        return dense.run(layer, inputs)
    case = Case.of(inputs)
    return KERNELS[kernel_for(layer, case)].run(layer, inputs, case)


def rounds_inputs(layer: Any, inputs: Tensor) -> bool:
    """Return whether the layer's kernel takes inputs that ``activation_bits`` has not rounded."""
    if layer.dense_form is not None:
        return dense.rounds_by_itself(layer)
    return not records_gradients() and kernel_for(layer, Case.of(inputs)) == "int8"
