"""Private names of accelerate: its hooks, and its mark of a prepared model."""

from __future__ import annotations

from typing import Any

from torch import nn


def offloaded_names(module: Any) -> set[str]:
    """Return the names of a module's own tensors that its hook loads before each forward."""
    weights = module._hf_hook.weights_map  # iterating reads names only, membership the file
    prefix = getattr(weights, "prefix", "")
    return {name.removeprefix(prefix) for name in weights}


def bind_hooked_forward(module: nn.Module, previous: type[nn.Module]) -> None:
    """Bind the forward that hooks call, or that they leave when they are removed, to a new class.

    A hook keeps the method of the class that the module had when the hook was added.
    """
    attributes = vars(module)
    for name in ("forward", "_old_forward"):
        if getattr(attributes.get(name), "__func__", None) is previous.forward:
            attributes[name] = type(module).forward.__get__(module)


def undo_accelerate_prepare(model: nn.Module) -> nn.Module:
    """Remove, in place, autocast and the mark "prepared" that accelerate leaves on a model.

    `unwrap_model(..., keep_fp32_wrapper=False)` would remove transformers' decorators as well.
    """
    attributes = vars(model)
    attributes.pop("_is_accelerate_prepared", None)
    original = attributes.pop("_original_forward", None)
    if original is not None:
        attributes.pop("forward", None)
        if model.forward != original:  # it was set on the instance
            model.forward = original
    return model
