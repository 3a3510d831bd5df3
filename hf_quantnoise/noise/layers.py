"""Noisy layers: a dynamic subclass of the layer's own class, so the module object stays the same.

During a forward the noisy tensor is in the instance's ``__dict__`` under ``weight``, where it
shadows the parameter, so every forward written for the original class works unchanged. Nothing is
registered: parameters, ``state_dict`` keys and ``isinstance`` are those of the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..dynamic_subclass import DynamicSubclass, change_class, make_dynamic_subclass
from ..layer_types import LayerType, known_layer_type
from .activations import ActivationNoise
from .operator import WeightNoise


@dataclass
class LayerNoise:
    """The noise of one layer: that of its weight, and that of its input, if any."""

    weight: WeightNoise
    member: int = 0  # index of the layer among those that hold the same weight
    activations: ActivationNoise | None = None


class QuantNoiseLayer(DynamicSubclass):
    """Mixin of every noisy layer: noise while ``.training``, the original layer otherwise."""

    _layer_type: ClassVar[LayerType]
    _layer_noise: LayerNoise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward on the noisy weight of Eq. 7."""
        noise = self._layer_noise
        if not self.training or not noise.weight.active:
            return super().forward(*args, **kwargs)
        if noise.activations is not None:
            args, kwargs = _with_noisy_input(noise.activations, args, kwargs)
        outer = self.__dict__.get("weight")  # replicas of nn.DataParallel keep their weight here
        noisy = noise.weight.noisy_weight(self.weight, self._layer_type, noise.member)
        # Dynamo tracks self.__dict__ only if it is written out: do not use a local name for it.
        self.__dict__["weight"] = noisy
        try:
            return super().forward(*args, **kwargs)
        finally:
            if outer is None:
                del self.__dict__["weight"]
            else:
                self.__dict__["weight"] = outer


def _with_noisy_input(noise: ActivationNoise, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return the arguments of a forward with noise on the first one, which may have a name."""
    if args:
        return (noise(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: noise(kwargs[name])}


class QuantNoiseLookup(QuantNoiseLayer):
    """Mixin of a noisy embedding: only the rows that are looked up get noise."""

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up and apply the noise of section 4.1 to them."""
        noise = self._layer_noise
        # max_norm shrinks rows of the parameter itself, so it must see the parameter.
        rows_only = self.max_norm is not None or 0 < input.numel() < self.num_embeddings
        if not rows_only or not self.training or not noise.weight.active:
            return super().forward(input)
        noise.weight.require_shape(self.weight.shape)
        values = nn.Embedding.forward(self, input)
        return noise.weight.noisy_rows(values, input, noise.member, self.padding_idx)


@cache
def noisy_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the noisy subclass of a layer class."""
    # An embedding that overrides forward (an offset, a scale) gets noise on its complete table.
    mixin = QuantNoiseLookup if cls.forward is nn.Embedding.forward else QuantNoiseLayer
    layer_type = known_layer_type(cls)
    return make_dynamic_subclass("QN", cls, (mixin, cls), noisy_class, _layer_type=layer_type)


def is_noisy(module: nn.Module) -> bool:
    """Return whether a module is a noisy layer."""
    return isinstance(module, QuantNoiseLayer)


def make_noisy(module: nn.Module, noise: LayerNoise) -> None:
    """Turn a layer of a known type into a noisy one, in place."""
    module.__dict__["_layer_noise"] = noise
    change_class(module, noisy_class(type(module)))


def remove_noise(module: nn.Module) -> None:
    """Undo :func:`make_noisy`: the same object with its original class."""
    change_class(module, cast(type[DynamicSubclass], type(module)).original_class)
    del module.__dict__["_layer_noise"]
