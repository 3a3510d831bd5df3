"""The ``weight`` of a packed layer: a tensor that can be read but not written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NoReturn

from torch import Tensor, nn

from ..compat import disabled_torch_function

# Methods whose results share memory with the tensor, so that a write to them is one to it.
_VIEWS = (
    *("__getitem__", "adjoint", "as_strided", "broadcast_to", "chunk", "detach", "diagonal"),
    *("expand", "expand_as", "flatten", "hsplit", "moveaxis", "movedim", "narrow", "permute"),
    *("ravel", "reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze"),
    *("swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind", "unflatten", "unfold"),
    *("unsafe_chunk", "unsafe_split", "unsqueeze", "view", "view_as", "vsplit"),
)
# In-place methods that do not change values.
_HARMLESS = {"detach_", "requires_grad_", "share_memory_"}


class ReadOnlyWeight(Tensor):
    """The decoded weight of a packed layer.

    A write to it would be lost silently: transformers writes to ``weight.data`` when it resizes a
    table, PEFT when it merges an adapter.
    """

    # The parameters that the weight is decoded from.
    _trained: Iterable[nn.Parameter] = ()

    # Operations are as fast as on a regular tensor, and return one.
    __torch_function__ = disabled_torch_function

    @property
    def data(self) -> Tensor:
        """The detached values, read-only as well."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise_read_only()

    @property
    def T(self) -> Tensor:  # type: ignore[override]
        """The transposed values, read-only as well."""
        return self.transpose(0, -1) if self.dim() == 2 else super().T

    @property
    def mT(self) -> Tensor:  # type: ignore[override]
        """The values with the last two dimensions swapped, read-only as well."""
        return self.transpose(-2, -1)

    @property
    def requires_grad(self) -> bool:
        """Whether the weight has a gradient. Setting it freezes or unfreezes the layer's state."""
        return super().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> ReadOnlyWeight:
        """Freeze or unfreeze the layer's state, as the weight itself is a result."""
        for parameter in self._trained:
            parameter.requires_grad_(requires_grad)
        return self


def raise_read_only(*_: Any, **__: Any) -> NoReturn:
    """Raise the ValueError of a write to a decoded weight."""
    raise ValueError(
        "the weight of a quantized layer is decoded from its codes and cannot be written to, to "
        "resize a table, merge an adapter or edit weights; call model.dequantize() first and "
        "quantize_model(model, config) afterwards"
    )


def _read_only_view(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    @wraps(method)
    def view(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        if isinstance(result, tuple):
            return tuple(part.as_subclass(ReadOnlyWeight) for part in result)
        shares = result.untyped_storage().data_ptr() == self.untyped_storage().data_ptr()
        return result.as_subclass(ReadOnlyWeight) if shares else result

    return view


for _name in _VIEWS:
    setattr(ReadOnlyWeight, _name, _read_only_view(_name))
for _name in dir(Tensor):
    _is_method = _name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS
    _is_operator = _name.startswith("__i") and hasattr(Tensor, _name.replace("__i", "__", 1))
    if _is_method or _is_operator or _name == "__setitem__":
        setattr(ReadOnlyWeight, _name, raise_read_only)
