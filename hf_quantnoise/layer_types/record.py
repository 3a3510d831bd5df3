"""The record that describes a layer type, and the registry of all records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def records_gradients() -> bool:
    """Return whether autograd records operations; never in ``torch.jit.trace``.

    It checks a trace against a second one without gradients, where layers decode in another way.
    """
    return torch.is_grad_enabled() and not torch.jit.is_tracing()


@dataclass(frozen=True, kw_only=True)
class LayerType:
    """Everything the package needs to know about one type of layer.

    Attributes:
        layer_class: the class; its subclasses are covered too.
        to_matrix: weight -> view of shape (rows, columns), see ``blocks.py``; by default itself.
        from_matrix: (matrix, shape of the weight) -> weight, again a view.
        packed_forward: the class that the packed layer inherits its forward from. It is
            ``layer_class`` if that reads ``self.weight`` once, or a subclass that decodes less (it
            can use ``decode_rows`` and ``linear`` of ``modeling.PackedLayer``). Layers of a type
            without one can get noise, but cannot be packed.
        input_energy: (layer, inputs) -> sum over the inputs of the squared value that multiplies
            each element of the weight matrix, shape (1, columns), or (rows, columns) for grouped
            layers; for ``importance="activations"``. None if there is no such value.
        group: the structure group outside of attention; None for ``"ffn"`` inside of repeated
            layers and ``"head"`` elsewhere.
        kernel_area: layer -> number of weights of one convolution kernel, which is its block size
            (section 7.8); 1 if any block size will do.
        input_size: layer -> number of values that enter it per position; None for the columns.
        features_last: whether inputs of three dimensions are (batch, positions, features), so that
            padding can be excluded from statistics.
        is_table: whether inputs are row indices of a lookup table.
    """

    layer_class: type[nn.Module]
    to_matrix: Callable[[Tensor], Tensor] = lambda weight: weight
    from_matrix: Callable[[Tensor, torch.Size], Tensor] = lambda matrix, shape: matrix
    packed_forward: type[nn.Module] | None = None
    input_energy: Callable[[nn.Module, Tensor], Tensor] | None = None
    group: str | None = None
    kernel_area: Callable[[nn.Module], int] = lambda layer: 1
    input_size: Callable[[nn.Module], int] | None = None
    features_last: bool = True
    is_table: bool = False


LAYER_TYPES: list[LayerType] = []


def register_layer_type(layer_type: LayerType) -> None:
    """Add a layer type to the ones that can be noised and packed."""
    LAYER_TYPES.append(layer_type)


def layer_type_of(layer: nn.Module | type[nn.Module]) -> LayerType | None:
    """Return the record of a layer (or of a layer class), or None if its type is unknown."""
    cls = layer if isinstance(layer, type) else type(layer)
    return next((entry for entry in LAYER_TYPES if issubclass(cls, entry.layer_class)), None)


def known_layer_type(layer: nn.Module | type[nn.Module]) -> LayerType:
    """Return the record of a layer (or of a layer class); raise TypeError if there is none."""
    found = layer_type_of(layer)
    if found is None:
        name = (layer if isinstance(layer, type) else type(layer)).__name__
        known = ", ".join(entry.layer_class.__name__ for entry in LAYER_TYPES)
        raise TypeError(f"unknown layer type {name}, expected one of {known}")
    return found
