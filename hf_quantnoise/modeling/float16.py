"""Tensors outside of packed layers, stored in float16 (``leftover_bits``).

They are rounded to float16 values at the end of compression and keep their dtype in memory. Files
hold them in float16 as long as that loses nothing: after further training they are float32 again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat import ignored_on_save, own_buffers, own_parameters, persistent_buffer_names
from ..configuration import QuantizedModelConfig
from ..configuration.layer_storage import SKIPPED_BY_CONFIG
from ..structure import find_layers, select_layers
from .convert import packed_names


def as_stored(tensor: Tensor, config: Any) -> Tensor:
    """Return a tensor outside of packed layers as it is saved with a quantization config, or none.

    It is float16 if the config stores such tensors in 16 bits and all values are the same there.
    """
    if getattr(config, "leftover_bits", 32) == 32 or not _is_larger(tensor) or tensor.is_meta:
        return tensor
    half = tensor.detach().to(torch.float16)
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def _is_larger(tensor: Tensor) -> bool:
    """Return whether float16 takes less than a tensor; scalars are not worth it."""
    return tensor.is_floating_point() and tensor.element_size() > 2 and tensor.dim() > 0


def excluded_layers(model: nn.Module, config: QuantizedModelConfig) -> list[str]:
    """Return the names of the layers that a config leaves as they are, all tensors of them."""
    selected = select_layers(model, config.target_modules, config.exclude_modules)
    names = {layer.name for layer in selected}
    by_config = {n for n, reason in config.left_dense.items() if reason == SKIPPED_BY_CONFIG}
    return [layer.name for layer in find_layers(model) if layer.name not in names - by_config]


@torch.no_grad()
def round_to_float16(model: nn.Module, kept: set[int]) -> list[str]:
    """Replace tensors outside of packed layers by ones with float16 values, in their own dtype.

    On the meta device, where only sizes matter, their dtype becomes float16. Tensors that are in no
    file, and those whose ``id`` is in ``kept``, stay. Returns the names of those that float16
    cannot hold, which stay as well.
    """
    unsaved = ignored_on_save(model)
    rounded: dict[int, Tensor | None] = {}  # tied tensors stay tied; None for those that stay
    too_large = []
    for prefix, module in model.named_modules():
        packed, saved = packed_names(module), persistent_buffer_names(module)
        for owner in (own_parameters(module), own_buffers(module)):
            for leaf, tensor in list(owner.items()):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if tensor is None or leaf in packed or name in unsaved or id(tensor) in kept:
                    continue
                if not _is_larger(tensor) or (owner is own_buffers(module) and leaf not in saved):
                    continue
                if id(tensor) not in rounded:
                    rounded[id(tensor)] = _rounded(tensor)
                    too_large += [name] if rounded[id(tensor)] is None else []
                if (values := rounded[id(tensor)]) is not None:
                    owner[leaf] = values  # type: ignore[assignment]
    return too_large


def _rounded(tensor: Tensor) -> Tensor | None:
    values = tensor.detach().to(torch.float16)
    if not tensor.is_meta:
        values = values.to(tensor.dtype)
        if bool((values.isinf() & ~tensor.isinf()).any()):
            return None
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(values, tensor.requires_grad) if is_parameter else values
