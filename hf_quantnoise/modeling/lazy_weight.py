"""The ``weight`` of a packed layer, decoded when an operation needs its values.

Models read attributes of weights in each forward: Gemma's table and T5's ``wo`` the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import disabled_torch_function, wrapper_tensor
from .read_only_weight import ReadOnlyWeight

_ATTRIBUTES = (
    *("device", "dtype", "is_cpu", "is_cuda", "is_meta", "is_quantized", "is_sparse", "itemsize"),
    *("layout", "nbytes", "ndim", "shape"),
)
_METHODS = (
    *("__len__", "dim", "element_size", "get_device", "is_complex", "is_floating_point"),
    *("ndimension", "nelement", "numel", "size"),
)
# What the tensor answers without values.
_FREE = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name) for name in _METHODS),
    *(torch.is_complex, torch.is_floating_point, torch.numel),
}


class LazyWeight(ReadOnlyWeight):
    """A weight that has a shape, dtype and device, and decodes its values at the first operation.

    Operations receive a :class:`ReadOnlyWeight`, with the gradients of the mode (``no_grad``,
    ``inference_mode``) in which the weight was read. They are computed once per object.
    """

    _decode: Callable[[], Tensor]
    _decoded: Tensor | None
    _modes: tuple[bool, bool]  # of inference and gradients

    @staticmethod
    def of(
        decode: Callable[[], Tensor],
        shape: Sequence[int],
        like: Tensor,
        trained: Iterable[nn.Parameter] = (),
    ) -> LazyWeight:
        """Return the weight that a function decodes.

        ``like`` has its dtype and device, and ``trained`` are the parameters it is decoded from.
        """
        weight: LazyWeight = wrapper_tensor(LazyWeight, shape, like.dtype, like.device)
        weight._decode, weight._decoded, weight._trained = decode, None, tuple(trained)
        weight._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return weight

    @property
    def decoded(self) -> Tensor:
        """The decoded weight."""
        if self._decoded is None:
            inference, gradients = self._modes
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                values = self._decode().as_subclass(ReadOnlyWeight)
            values._trained = self._trained
            self._decoded = values
        return self._decoded

    @property
    def requires_grad(self) -> bool:
        """Whether the weight has a gradient. Setting it freezes or unfreezes the layer's state."""
        if self._decoded is not None:
            return self._decoded.requires_grad
        return self._modes[1] and any(parameter.requires_grad for parameter in self._trained)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def detach(self) -> LazyWeight:  # also of nn.Parameter, which needs the same type
        """Return the values without gradients, decoded when they are needed."""
        return LazyWeight.of(lambda: self.decoded.detach(), self.shape, self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _FREE:
            return disabled_torch_function(func, types, args, kwargs or {})
        return func(*_with_values(args), **_with_values(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Only if torch functions are disabled, so that autograd did not see the decoded values.
        args, kwargs = (_with_values(each, _without_gradients) for each in (args, kwargs or {}))
        return func(*args, **kwargs)


def _with_gradients(weight: LazyWeight) -> Tensor:
    return weight.decoded


def _without_gradients(weight: LazyWeight) -> Tensor:
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "cannot compute gradients of the weight of a packed layer while torch functions are "
            "disabled; use layer.decode() instead of layer.weight"
        )
    return weight.decoded.detach().as_subclass(Tensor)


def _with_values(value: Any, values_of: Callable[[LazyWeight], Tensor] = _with_gradients) -> Any:
    """Return arguments of an operation with decoded weights."""
    if isinstance(value, LazyWeight):
        return values_of(value)
    if type(value) in (list, tuple):
        return type(value)(_with_values(each, values_of) for each in value)
    if type(value) is dict:
        return {key: _with_values(each, values_of) for key, each in value.items()}
    return value
