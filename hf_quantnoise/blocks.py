"""The one blocking rule (section 3.2): which numbers of a weight form a block.

Every weight is seen as a matrix ``(rows, columns)``: rows are output features (or the words of a
vocabulary), columns the input features a row reads. A block is ``block_size`` consecutive columns
of one row. In the paper's notation ``y = x W`` these are the subvectors of the columns of ``W``.

Noise, storage and the size report all call this file, so they cannot disagree about a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class WeightLayout:
    """How one type of layer lays out its weight.

    Attributes:
        name: name of the layout (``"linear"``, ``"conv1d"``, ``"embedding"``).
        base: the layer type it belongs to; subclasses of it are covered too.
        to_matrix: weight -> matrix view of shape (rows, columns).
        from_matrix: matrix of shape (rows, columns) -> weight (a view again).
    """

    name: str
    base: type[nn.Module]
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]


LAYOUTS: list[WeightLayout] = []


def register_layout(layout: WeightLayout) -> WeightLayout:
    """Adds a layer type to the ones the package can block."""
    LAYOUTS.append(layout)
    return layout


def _same(tensor: Tensor) -> Tensor:
    return tensor


register_layout(WeightLayout("linear", nn.Linear, _same, _same))
register_layout(WeightLayout("embedding", nn.Embedding, _same, _same))
# GPT-2's Conv1D is a Linear with its weight transposed: (in, out).
register_layout(WeightLayout("conv1d", Conv1D, Tensor.t, Tensor.t))


def layout_of(module: nn.Module) -> WeightLayout | None:
    """The layout of a layer, or None where the package has no blocking rule for its type."""
    return next((layout for layout in LAYOUTS if isinstance(module, layout.base)), None)


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
    layout = layout_of(module)
    if layout is None:
        known = ", ".join(entry.base.__name__ for entry in LAYOUTS)
        raise TypeError(f"no blocking rule for {type(module).__name__}; known layers: {known}")
    with torch.no_grad():
        return layout.to_matrix((module.weight if weight is None else weight).detach())
