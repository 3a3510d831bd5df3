"""Offloaded models.

accelerate's hooks hold some tensors in main memory or on disk until their layer runs; until then
the layer has empty tensors on the meta device.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import is_initialized, load_offloaded_parameter, offloaded_names


def is_offloaded(module: nn.Module) -> bool:
    """Return whether a tensor of a module itself (not of its children) is offloaded."""
    return any(tensor.is_meta for tensor in module.parameters(recurse=False))


def was_read(layer: nn.Module, name: str) -> bool:
    """Return whether a tensor of a layer was loaded from the checkpoint."""
    tensor = layer.get_parameter(name)
    return name in offloaded_names(layer) if tensor.is_meta else is_initialized(tensor)


def cannot_be_fetched(name: str, reason: str) -> ValueError:
    """Return the error for a layer that cannot be offloaded."""
    return ValueError(
        f"invalid device_map: {name} {reason}, so it cannot be offloaded; use a device_map that "
        "does not put it on 'disk' or 'cpu'"
    )


def require_in_memory(model: PreTrainedModel) -> None:
    """Raise ValueError if a parameter of a model that is to be quantized is offloaded."""
    offloaded = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if offloaded is not None:
        raise ValueError(
            f"invalid device_map: {offloaded} is offloaded, and a weight must be in memory to be "
            "quantized; quantize without offloading, save_pretrained, and load the result with "
            "this device_map"
        )


def fetched(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of the state dict, read from where it is offloaded if necessary."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor
