"""Tensors of packed layers that are never trained: codes, scales and zero points.

They are buffers, so that optimizers, gradient clipping and averages of parameters do not see them.
Only while transformers loads a layer, and in layers that accelerate offloads, they are in the
module's ``_parameters``: both handle parameters there and leave buffers in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat import disabled_torch_function


class _Fixed:
    """Mixin of tensors whose codes cannot be replaced by floats.

    An average of equal codes is a float that may be just below the code: 2.9999998 would become 2.
    """

    def detach(self: Any) -> Tensor:
        """Return the values, which share memory; codes stay protected."""
        values = Tensor.detach(self)
        return values if self.is_floating_point() else values.as_subclass(FixedView)

    def copy_(self: Any, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy values in place; floats copied to codes must be equal to them after rounding."""
        if self.is_floating_point() or not source.is_floating_point():
            return Tensor.copy_(self, source, non_blocking)
        rounded = source.detach().round().to(device=self.device, dtype=self.dtype)
        if not torch.equal(rounded, Tensor.detach(self)):
            raise ValueError(
                "invalid codes of a quantized layer: got an average of different codes, expected "
                "integers; average only models that were trained from the same quantized model, or "
                "call model.dequantize() on each of them first"
            )
        return self


class FixedView(_Fixed, Tensor):
    """Codes in a state dict, which pickle as a regular tensor."""

    __torch_function__ = disabled_torch_function

    def __reduce_ex__(self, protocol):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), self.clone())


class NonTrainableParameter(_Fixed, nn.Parameter):
    """Codes, a scale or a zero point, as its layer holds it.

    It is a ``Parameter`` for transformers, which ties no other tensors. ``requires_grad_`` does
    nothing: callers enable the gradients of all that a module holds, and torch raises for integers.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> NonTrainableParameter:
        return super().__new__(cls, data.as_subclass(Tensor), False)

    def requires_grad_(self, requires_grad: bool = True) -> NonTrainableParameter:
        return self

    def __reduce_ex__(self, protocol):
        return NonTrainableParameter, (self.data,)  # nn.Parameter would restore its own class
