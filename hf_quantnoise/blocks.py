"""The blocking rule (section 3.2): which values of a weight form a block.

Every weight is seen as a matrix ``(rows, columns)``, made by ``layer_types/``: rows are output
features (or the words of a vocabulary), columns are the input features of a row. A block is
``block_size`` consecutive columns of one row. In the paper's notation ``y = x W`` these are the
subvectors of the columns of ``W``.

The columns of a convolution are its input channels, each with its kernel flattened, so that a block
of the kernel's area is one kernel of one channel (section 7.8: 9 for 3 x 3). Larger kernels are cut
into their rows (5 for 5 x 5).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .layer_types import LayerType, known_layer_type


def to_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """Cut a matrix (rows, columns) into blocks: (rows * columns / block_size, block_size).

    The blocks of the first row come first. The result is a view if ``matrix`` is contiguous.
    """
    if matrix.shape[-1] % block_size:
        raise ValueError(
            f"invalid block_size={block_size}: it does not divide the {matrix.shape[-1]} columns "
            f"of a {tuple(matrix.shape)} matrix; use a divisor of {matrix.shape[-1]}"
        )
    return matrix.reshape(-1, block_size)


def weight_matrix(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Return the detached (rows, columns) view of a layer's weight, or of ``weight`` instead."""
    layer_type = known_layer_type(module)
    with torch.no_grad():
        return layer_type.to_matrix((module.weight if weight is None else weight).detach())


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of :func:`weight_matrix`; cached, as loading asks for it several times."""
    return _matrix_shape(known_layer_type(module), module.weight.shape)


@cache
def _matrix_shape(layer_type: LayerType, shape: torch.Size) -> tuple[int, int]:
    return layer_type.matrix_shape(shape)
