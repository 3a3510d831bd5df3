"""The inputs that a kernel is chosen by, and code that kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...compat.torch_func import in_torch_func, is_graph

# A matrix is decoded in slices of about this size: a large table (a tied LM head) is never dense.
SCRATCH_BYTES = 8 * 2**20
# Part of it for few inputs, so that a slice stays in a cache. For many inputs it does not pay, as
# the outputs of slices are copied.
FEW_INPUTS = 64
PART_FOR_FEW = 1 / 4
MANY = 2**30


@dataclass(frozen=True)
class Case:
    """Inputs of a packed layer.

    Attributes:
        n_inputs: number of input vectors, e.g. batch size times length.
        dtype: dtype of the products: of the inputs, or of autocast.
        device: type of the device.
        is_autocast: whether autocast sets the dtype.
        has_memory: whether their values are at an address, unlike those of ``torch.func``, which
            only operations of torch can read.
    """

    n_inputs: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    is_autocast: bool = False
    has_memory: bool = True

    @classmethod
    def of(cls, inputs: Tensor) -> Case:
        """Return the case of some inputs (..., columns) in the autocast context of the caller."""
        device = inputs.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else inputs.dtype
        # A graph must not depend on the number of inputs.
        if is_graph():
            return cls(MANY, dtype, device, autocast, has_memory=False)
        has_memory = type(inputs) in (Tensor, nn.Parameter) and not in_torch_func()
        return cls(inputs.shape[:-1].numel(), dtype, device, autocast, has_memory)


class Kernel(Protocol):
    """A way to compute ``inputs @ weight.T + bias`` of a packed layer without gradients.

    ``layer`` is a ``PackedLayer``. Kernels have no state, so that any thread can run them.
    """

    def is_available(self) -> bool:
        """Return whether this machine and this torch can run the kernel."""

    def supports(self, layer: Any, case: Case) -> bool:
        """Return whether the kernel gives the layer's result for such inputs."""

    def run(self, layer: Any, inputs: Tensor, case: Case) -> Tensor:
        """Return the outputs (..., rows) of inputs (..., columns), which are those of the case."""


def in_slices(
    layer: Any, case: Case, bytes_per_value: int, part: Callable[[slice], Tensor]
) -> Tensor:
    """Return the outputs of slices of a layer's rows, in a row.

    ``part`` maps a slice to outputs (..., rows of the slice); ``bytes_per_value`` is the memory
    that it takes for each value of the weight.
    """
    scratch = SCRATCH_BYTES * (PART_FOR_FEW if case.n_inputs <= FEW_INPUTS else 1)
    n_slices = math.ceil(layer.rows * layer.columns * bytes_per_value / scratch)
    if n_slices <= 1 or not layer.rows_are_aligned:
        return part(slice(0, layer.rows))
    step = math.ceil(layer.rows / n_slices)
    starts = range(0, layer.rows, step)
    return torch.cat([part(slice(start, start + step)) for start in starts], dim=-1)


def check_inputs(layer: Any, inputs: Tensor, *weight: Tensor | None) -> None:
    """Raise a ValueError if inputs do not fit the tensors of a weight.

    For kernels that read memory themselves: operations of torch check it.
    """
    if inputs.shape[-1:] != (layer.columns,):
        raise ValueError(
            f"invalid shape of inputs: got {tuple(inputs.shape)}, expected (..., {layer.columns}), "
            "the number of columns of the weight; pass inputs of this size"
        )
    for tensor in weight:
        if tensor is not None and tensor.device != inputs.device:
            raise ValueError(
                f"invalid device of inputs: got {inputs.device}, expected that of the weight, "
                f"{tensor.device}; move one of them"
            )


def codes_of(layer: Any, rows: slice) -> Tensor:
    """Return the codes of some rows of a layer."""
    shape = (layer.rows, layer.columns)
    return layer.quantizer.unpack(layer.weight_indices, layer.state, shape, rows)


def bias_of(layer: Any, rows: slice) -> Tensor | None:
    """Return the bias of some rows of a layer, if it has one."""
    return None if layer.bias is None else layer.bias[rows]
