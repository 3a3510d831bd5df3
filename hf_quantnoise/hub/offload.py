"""Models of which parts lie in main memory or on disk until they run: accelerate's hooks hold their
tensors, and the layers hold empty ones on the meta device."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter


def is_offloaded(module: nn.Module) -> bool:
    """Whether some tensor of a module (not of its children) lies elsewhere."""
    return any(tensor.is_meta for tensor in module.parameters(recurse=False))


def was_read(layer: nn.Module, name: str) -> bool:
    """Whether a tensor of a layer came from the checkpoint that is being loaded."""
    tensor = layer.get_parameter(name)
    if tensor.is_meta:
        weights = layer._hf_hook.weights_map
        # Fingerprint for the name itself, it would read the file.
        return f"{getattr(weights, 'prefix', '')}{name}" in set(weights)
    return getattr(tensor, "_is_hf_initialized", False)


def cannot_be_fetched(name: str, what: str) -> ValueError:
    """The error where a layer cannot be fetched tensor by tensor."""
    return ValueError(
        f"device_map: {name} {what}, which cannot be fetched layer by layer; give a device_map "
        "that offloads it neither to 'disk' nor to 'cpu'"
    )


def require_in_memory(model: PreTrainedModel) -> None:
    """Refuses to quantize what is offloaded.

    Raises:
        ValueError: if a parameter of the model is.
    """
    away = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if away is not None:
        raise ValueError(
            f"device_map: {away} is offloaded, and a weight must be in memory to be quantized; "
            "quantize without offloading, save_pretrained, and load what was saved with this "
            "device_map"
        )


def fetched(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the state dict, from wherever it lies."""
    return load_offloaded_parameter(model, name) if tensor.is_meta else tensor
