"""The record that describes a layer type, and the registry of all records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GROUPS = ("ffn", "attention", "embeddings", "head", "conv")


def records_gradients() -> bool:
    """Return whether autograd records operations; never in ``torch.jit.trace``.

    It checks a trace against a second one without gradients, where layers decode in another way.
    """
    return torch.is_grad_enabled() and not torch.jit.is_tracing()


@dataclass(frozen=True, kw_only=True)
class LayerType:
    """Everything the package needs to know about one type of layer.

    A field of the wrong type raises ValueError. Whether ``to_matrix`` and ``from_matrix`` fit the
    weights of a model is checked when its layers are found, before anything is changed.

    Attributes:
        layer_class: the class; subclasses without a separate type are covered too.
        to_matrix: weight -> view of shape (rows, columns), see ``blocks.py``; by default itself.
        from_matrix: (matrix, shape of the weight) -> weight, again a view.
        packed_forward: the class that the packed layer inherits its forward from. It is
            ``layer_class`` if that reads ``self.weight`` once, or a subclass that decodes less (it
            can use ``decode_rows`` and ``linear`` of ``modeling.PackedLayer``). Layers of a type
            without one can get noise, but cannot be packed.
        input_energy: (layer, inputs) -> sum over the inputs of the squared value that multiplies
            each element of the weight matrix, shape (1, columns), or (rows, columns) for grouped
            layers; for ``importance="activations"``. None if there is no such value.
        group: the structure group (one of ``GROUPS``) outside of attention; None for ``"ffn"``
            inside of repeated layers and ``"head"`` elsewhere.
        kernel_block: layer -> number of weights of a convolution kernel, or of one row of a large
            kernel, which is its block size (section 7.8); 1 if any block size will do.
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
    kernel_block: Callable[[nn.Module], int] = lambda layer: 1
    input_size: Callable[[nn.Module], int] | None = None
    features_last: bool = True
    is_table: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.layer_class, type) or not issubclass(self.layer_class, nn.Module):
            raise self._invalid("layer_class", self.layer_class, "a subclass of nn.Module")
        forward = self.packed_forward
        is_class = isinstance(forward, type) and issubclass(forward, self.layer_class)
        if forward is not None and not is_class:
            name = self.layer_class.__name__
            raise self._invalid("packed_forward", forward, f"{name}, a subclass of it, or None")
        for field in ("to_matrix", "from_matrix", "kernel_block"):
            if not callable(value := getattr(self, field)):
                raise self._invalid(field, value, "a function")
        for field in ("input_energy", "input_size"):
            if (value := getattr(self, field)) is not None and not callable(value):
                raise self._invalid(field, value, "a function or None")
        if self.group is not None and self.group not in GROUPS:
            raise self._invalid("group", self.group, f"one of {', '.join(GROUPS)}, or None")

    def _invalid(self, field: str, value: object, expected: str) -> ValueError:
        """Return the error of a wrong field, to be raised."""
        name = getattr(self.layer_class, "__name__", self.layer_class)
        return ValueError(
            f"invalid {field} of the layer type {name}: got {value!r}, expected {expected}; "
            "correct the LayerType"
        )

    def matrix_shape(self, shape: torch.Size) -> tuple[int, int]:
        """Return (rows, columns) of the matrix of a weight, and check the functions on the way."""
        with torch.no_grad():
            weight = torch.empty(shape, device="meta")
            matrix = self._checked("to_matrix", lambda: self.to_matrix(weight), tuple(shape))
            if matrix.dim() != 2 or matrix.numel() != weight.numel():
                expected = f"two dimensions and {weight.numel()} values"
                found = f"shape {tuple(matrix.shape)} from a weight of shape {tuple(shape)}"
                raise self._invalid("to_matrix", found, expected)
            size = tuple(matrix.shape)
            back = self._checked("from_matrix", lambda: self.from_matrix(matrix, shape), size)
            if back.shape != shape:
                found = f"shape {tuple(back.shape)} from a matrix of shape {size}"
                raise self._invalid("from_matrix", found, f"the weight's shape {tuple(shape)}")
        rows, columns = size
        return rows, columns

    def _checked(self, field: str, run: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        try:
            result = run()
        except Exception as error:  # of any type, as the function is not ours
            found = f"{type(error).__name__}: {error}"
            raise self._invalid(field, found, f"a tensor for shape {shape}") from error
        if not isinstance(result, Tensor):
            raise self._invalid(field, result, f"a tensor for shape {shape}")
        return result

    def require_inverse(self, weight: Tensor) -> None:
        """Raise ValueError if ``from_matrix`` does not undo ``to_matrix``; no work for views."""
        back = self.from_matrix(self.to_matrix(weight), weight.shape)
        if not (back.is_set_to(weight) or torch.equal(back, weight)):
            raise self._invalid("from_matrix", "other values", "the inverse of to_matrix")


LAYER_TYPES: list[LayerType] = []


def register_layer_type(layer_type: LayerType) -> None:
    """Add a layer type to the ones that can be noised and packed.

    It applies to its class and subclasses, unless one of these has a separate type.
    """
    LAYER_TYPES.append(layer_type)


def layer_type_of(layer: nn.Module | type[nn.Module]) -> LayerType | None:
    """Return the record of a layer (or of a layer class), or None if its type is unknown."""
    cls = layer if isinstance(layer, type) else type(layer)
    known = {entry.layer_class: entry for entry in LAYER_TYPES}  # the last one registered
    return next((known[base] for base in cls.__mro__ if base in known), None)


def known_layer_type(layer: nn.Module | type[nn.Module]) -> LayerType:
    """Return the record of a layer (or of a layer class); raise TypeError if there is none."""
    found = layer_type_of(layer)
    if found is None:
        name = (layer if isinstance(layer, type) else type(layer)).__name__
        known = ", ".join(entry.layer_class.__name__ for entry in LAYER_TYPES)
        raise TypeError(f"unknown layer type {name}, expected one of {known}")
    return found
