"""Values that float16 can hold, in another dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def clamp_to_half(tensor: Tensor) -> Tensor:
    """Clamp to the range of float16."""
    limit = torch.finfo(torch.float16).max
    return tensor.clamp(-limit, limit)


def to_half(tensor: Tensor) -> Tensor:
    """Return the nearest float16 values, as float16."""
    return clamp_to_half(tensor).to(torch.float16)


def round_to_half(tensor: Tensor) -> Tensor:
    """Round to float16 values, in the tensor's own dtype."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return _round_in_one(tensor)
    return to_half(tensor).to(tensor.dtype)


@torch.library.custom_op("hf_quantnoise::round_to_half", mutates_args=())
def _round_in_one(tensor: Tensor) -> Tensor:
    """Round as one operation: inductor removes a cast to float16 and back."""
    return to_half(tensor).to(tensor.dtype)


@_round_in_one.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)
