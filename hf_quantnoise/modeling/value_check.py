"""Checks of the values that packed layers are loaded with, which come from a file.

A code beyond the codebook would fail in the first forward, or read another centroid; NaN would
spread silently. Codes are read only if their bits can hold an invalid one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..quantizers import Quantizer
from ..quantizers.packing import has_code_from, largest_code

# No fit gives a larger zero point: |z| = |min W| / s, with s at least |min W| 2^-24 / 255.
MAX_ZERO_POINT = 2.0**32

_is_on: ContextVar[bool] = ContextVar("check_values", default=True)


@contextmanager
def values_unchecked() -> Iterator[None]:
    """Accept any codes and floats inside this context, in the current thread."""
    token = _is_on.set(False)
    try:
        yield
    finally:
        _is_on.reset(token)


@torch.no_grad()
def invalid_values(quantizer: Any, n_codes: int, name: str, tensor: Tensor) -> str | None:
    """Return what is wrong with a tensor of a packed layer that was loaded, or None.

    The dtype is checked also in :func:`values_unchecked`.

    Args:
        quantizer: how the layer is stored.
        n_codes: number of codes of the layer.
        name: ``"indices"`` (the packed codes), a key of the quantizer's state, ``"input_scale"`` or
            ``"input_zero_point"``.
        tensor: centroids of 8 bits may be codes, as in a file, or floats, as in memory.
    """
    if name == "indices":
        return _invalid_codes(quantizer, n_codes, tensor)
    if name == "row_groups":
        if tensor.dtype != torch.uint8:
            return f"got {tensor.dtype}, expected the packed groups of rows in torch.uint8"
        return quantizer.invalid_row_groups(tensor) if _is_on.get() else None
    if name == "codebook" and quantizer.encodes_state and tensor.dtype == torch.uint8:
        return None
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return f"got {tensor.dtype}, expected floats of 16 bits or more ({quantizer.short_name})"
    if not _is_on.get():
        return None
    low, high = (float(end) for end in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"got NaN or infinite values (in {tensor.dtype}), expected finite ones"
    if name.endswith("zero_point") and max(-low, high) > MAX_ZERO_POINT:
        return f"got values from {low:g} to {high:g}, expected up to {MAX_ZERO_POINT:g}"
    # In float16 small scales are rounded to zero.
    is_zero = low == 0 and tensor.dtype != torch.float16
    if (name in quantizer.positive or name == "input_scale") and (low < 0 or is_zero):
        return f"got {low:g}, expected scales above 0"
    return None


def _invalid_codes(quantizer: Quantizer, count: int, codes: Tensor) -> str | None:
    if codes.dtype != torch.uint8:
        return f"got {codes.dtype}, expected packed codes in torch.uint8"
    bits, limit = quantizer.code_bits, quantizer.n_values
    # With 2^bits values every code is valid.
    if not _is_on.get() or limit == 2**bits or not has_code_from(codes, bits, count, limit):
        return None
    largest = largest_code(codes, bits, count)
    return f"got the code {largest}, expected 0 to {limit - 1} ({quantizer.short_name})"
