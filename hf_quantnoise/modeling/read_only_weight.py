"""The ``weight`` of a packed layer: a tensor that can be read but not written to."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ..compat import disabled_torch_function

# The in-place methods that weights are usually written with.
_WRITES = (
    *("copy_", "fill_", "zero_", "normal_", "uniform_", "add_", "sub_", "mul_", "div_"),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "index_copy_", "set_"),
)


class ReadOnlyWeight(Tensor):
    """The decoded weight of a packed layer.

    A write to it would be lost silently: transformers writes to ``weight.data`` when it resizes a
    table, PEFT when it merges an adapter.
    """

    # Operations are as fast as on a regular tensor, and return one.
    __torch_function__ = disabled_torch_function

    @property
    def data(self) -> Tensor:
        """The detached values, read-only as well."""
        return self.detach().as_subclass(ReadOnlyWeight)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise_read_only()


def raise_read_only(*_: Any, **__: Any) -> NoReturn:
    """Raise the ValueError of a write to a decoded weight."""
    raise ValueError(
        "the weight of a quantized layer is decoded from its codes and cannot be written to; to "
        "resize a table, merge an adapter or edit weights, call model.dequantize() first and "
        "quantize_model(model, config) afterwards"
    )


for _name in _WRITES:
    setattr(ReadOnlyWeight, _name, raise_read_only)
