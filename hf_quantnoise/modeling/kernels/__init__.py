"""Kernels: ways to multiply inputs with the weight of a packed layer, without gradients.

There is one file or folder per kernel; ``case.py`` has their interface. Inputs go to the first
kernel of :data:`KERNELS` that supports them and is available:

| kernel | device | dtype of products | inputs | weight |
|---|---|---|---|---|
| ``compiled`` | CPU, with llvmlite | float32 | a few; any with tables | int8, blocks of 2 to 16 |
| ``int8`` | CPU with VNNI | int8 | any number, of 8 bits or fewer | intN, or 8-bit centroids |
| ``tables`` | CPU | float32 | up to 64 | blocks of 8 or more, rows at least 5 times the centroids |
| ``triton`` | CUDA | float32, float16, bfloat16 | up to 512; float32: 64 | one codebook, K <= 256 |
| ``autocast`` | any | that of autocast | any number | one codebook, no scale per row |
| ``decode`` | any | that of inputs or autocast | any | any |

``compiled``, ``int8``, ``tables``, ``triton`` and ``decode`` give the same values but for the
rounding of sums (``compiled`` also for models in 16 bits, whose weights it does not round).
A graph that is traced, exported or compiled must not depend on the number of inputs: its kernels
are :data:`IN_GRAPHS`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Tensor

from ...compat.torch_func import is_graph, records_tangents
from ...layer_types import records_gradients
from . import autocast, compiled, decode, dense, int8, tables, triton_products
from .case import Case, Kernel

__all__ = ["IN_GRAPHS", "KERNELS", "Case", "Kernel", "kernel_for", "rounds_inputs", "run_kernel"]

KERNELS: MappingProxyType[str, Kernel] = MappingProxyType(
    {
        "compiled": compiled,
        "int8": int8,
        "tables": tables,
        "triton": triton_products,
        "autocast": autocast,
        "decode": decode,
    }
)
IN_GRAPHS = ("triton", "decode")


def kernel_for(layer: Any, case: Case) -> str:
    """Return the name of the kernel that a layer uses; ``layer.kernels`` are those it may use."""
    if records_tangents() and not is_graph():  # of which some kernels compute none
        return "decode"
    for name in IN_GRAPHS if is_graph() else KERNELS:
        kernel = KERNELS[name]
        if name in layer.kernels and kernel.supports(layer, case) and kernel.is_available():
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
