"""Reading centroids by their codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat.torch_func import is_graph

# A dtype for each size in bytes: a centroid of that size is copied as one element.
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def is_wide(codes: Tensor, row_bytes: int) -> bool:
    """Return whether :func:`gather_rows` copies rows of some size as one element each.

    It is about three times as fast as ``F.embedding``, and gives the same bits.
    """
    return row_bytes in _WIDE and codes.device.type == "cpu" and not is_graph()


def gather_rows(table: Tensor, codes: Tensor) -> Tensor:
    """Return ``table[codes]``, shape (*codes.shape, table.shape[1]), without a gradient."""
    row_bytes = table.shape[1] * table.element_size()
    # The table is copied first, as it may begin anywhere in a mapped file.
    if codes.numel() < len(table) or not is_wide(codes, row_bytes):
        return F.embedding(codes.int(), table)  # much faster than indexing
    elements = table.detach().clone(memory_format=torch.contiguous_format).view(_WIDE[row_bytes])
    rows = codes.reshape(-1, codes.shape[-1]).long()  # threads divide the rows
    found = elements.view(1, -1).expand(len(rows), -1).gather(1, rows)
    return found.view(*codes.shape, 1).view(table.dtype)
