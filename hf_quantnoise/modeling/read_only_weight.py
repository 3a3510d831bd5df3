"""The decoded weight that a packed layer shows: a tensor to read, not to be written to."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

# Every in-place method would do the same; these are the ones that weights are written with.
_WRITES = (
    *("copy_", "fill_", "zero_", "normal_", "uniform_", "add_", "sub_", "mul_", "div_"),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "index_copy_", "set_"),
)


class ReadOnlyWeight(Tensor):
    """What ``weight`` of a packed layer is: decoded for whoever asks, and not what is stored.

    A write to it would be lost without a word: transformers writes to ``weight.data`` where it
    resizes a table, PEFT where it merges an adapter or begins one that changes the weight.
    """

    # As quick as a plain tensor, and what is computed from it is one.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """The numbers, without their history, as little to be written to.

        Raises:
            ValueError: if it is set.
        """
        return self.detach().as_subclass(ReadOnlyWeight)

    @data.setter
    def data(self, value: Tensor) -> None:
        refuse()


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Raises the ValueError that tells the way out."""
    raise ValueError(
        "the weight of a quantized layer is decoded from its codes and cannot be written to: to "
        "resize a table, merge an adapter or edit weights, call model.dequantize() first, and "
        "quantize_model(model, config) afterwards"
    )


for _name in _WRITES:
    setattr(ReadOnlyWeight, _name, refuse)


def shown(weight: Tensor) -> Tensor:
    """A decoded weight for those outside; differentiable as before. Compiled graphs, in which
    nobody writes to weights, go on with the plain tensor."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(ReadOnlyWeight)
