"""The one blocking rule (section 3.2): which numbers of a weight form a block.

Every weight is seen as a matrix ``(rows, columns)``: rows are output features (or the words of a
vocabulary), columns the input features a row reads. A block is ``block_size`` consecutive columns
of one row. In the paper's notation ``y = x W`` these are the subvectors of the columns of ``W``.

A convolution's columns are its input channels, each with the numbers of its kernel in a row, so
that a block of the kernel's area is one kernel of one channel (section 7.8: 9 for 3 x 3). Size
rules for convolutions are in :func:`kernel_area`.

Noise, storage and the size report all call this file, so they cannot disagree about a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class WeightLayout:
    """How one type of layer lays out its weight.

    Attributes:
        name: name of the layout (``"linear"``, ``"conv1d"``, ``"embedding"``, ``"conv2d"``).
        base: the layer type it belongs to; subclasses of it are covered too.
        to_matrix: weight -> matrix view of shape (rows, columns).
        from_matrix: (matrix of shape (rows, columns), shape of the weight) -> weight, again a view.
    """

    name: str
    base: type[nn.Module]
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor, torch.Size], Tensor]


LAYOUTS: list[WeightLayout] = []


def register_layout(layout: WeightLayout) -> WeightLayout:
    """Adds a layer type to the ones the package can block."""
    LAYOUTS.append(layout)
    return layout


def _same(tensor: Tensor, shape: torch.Size | None = None) -> Tensor:
    return tensor


def _transposed(tensor: Tensor, shape: torch.Size | None = None) -> Tensor:
    return tensor.t()


def _flat_kernels(weight: Tensor) -> Tensor:
    return weight.flatten(1)


register_layout(WeightLayout("linear", nn.Linear, _same, _same))
register_layout(WeightLayout("embedding", nn.Embedding, _same, _same))
# GPT-2's Conv1D is a Linear with its weight transposed: (in, out).
register_layout(WeightLayout("conv1d", Conv1D, _transposed, _transposed))
# (out, in / groups, height, width): grouped and depthwise ones have fewer columns.
register_layout(WeightLayout("conv2d", nn.Conv2d, _flat_kernels, Tensor.reshape))


def layout_of(module: nn.Module) -> WeightLayout | None:
    """The layout of a layer, or None where the package has no blocking rule for its type."""
    return next((layout for layout in LAYOUTS if isinstance(module, layout.base)), None)


def kernel_area(module: nn.Module) -> int:
    """Numbers of one kernel of a convolution; 1 where a block may be any number of inputs.

    Those are 1 x 1 convolutions, and such whose patches do not overlap (a ViT's patch embedding):
    both are Linear layers on rearranged inputs.
    """
    if not isinstance(module, nn.Conv2d):
        return 1
    (height, width), stride = module.kernel_size, tuple(module.stride)
    return 1 if stride == (height, width) and module.groups == 1 else height * width


def to_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """Cuts a matrix (rows, columns) into blocks: (rows * columns / block_size, block_size).

    Row-major: the blocks of the first row come first. A view where ``matrix`` is contiguous.

    Raises:
        ValueError: if ``block_size`` does not divide the columns.
    """
    if matrix.shape[-1] % block_size:
        raise ValueError(
            f"block_size={block_size} does not divide the {matrix.shape[-1]} columns of a "
            f"{tuple(matrix.shape)} matrix; use a divisor of {matrix.shape[-1]}"
        )
    return matrix.reshape(-1, block_size)


def from_blocks(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`to_blocks`: blocks back to the matrix (rows, columns)."""
    return blocks.reshape(rows, columns)


def weight_matrix(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The detached (rows, columns) view of a layer's weight (or of ``weight`` in its place)."""
    layout = _known_layout(module)
    with torch.no_grad():
        return layout.to_matrix((module.weight if weight is None else weight).detach())


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(rows, columns) of :func:`weight_matrix`, without making it: a model that is being loaded is
    asked for all of them several times."""
    return _matrix_shape(_known_layout(module), module.weight.shape)


@cache
def _matrix_shape(layout: WeightLayout, shape: torch.Size) -> tuple[int, int]:
    return tuple(layout.to_matrix(torch.empty(shape, device="meta")).shape)


def _known_layout(module: nn.Module) -> WeightLayout:
    layout = layout_of(module)
    if layout is None:
        known = ", ".join(entry.base.__name__ for entry in LAYOUTS)
        raise TypeError(f"no blocking rule for {type(module).__name__}; known layers: {known}")
    return layout
