"""Noisy layers: a subclass made of the layer's own class, so the module object stays the same.

During its forward the noisy tensor stands in the instance's ``__dict__`` under ``weight``, where it
hides the parameter; every forward written for the original class then works unchanged. Nothing is
registered: parameters, ``state_dict`` keys and ``isinstance`` are the original's.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from ..dynamic_subclass import DynamicSubclass, make_dynamic_subclass
from ..layer_types import LAYER_TYPES, LayerType, layer_type_of
from .activations import ActivationNoise
from .operator import WeightNoise

# Attributes of a noisy layer, beside those of its original class.
_NOISE = "_quant_noise_weight"
_MEMBER = "_quant_noise_member"
_ACTIVATIONS = "_quant_noise_activations"


class QuantNoiseLayer(DynamicSubclass):
    """Mixin of every noisy layer: noise while ``.training``, the original layer otherwise."""

    _quant_noise_layout: ClassVar[LayerType]
    _quant_noise_weight: WeightNoise
    _quant_noise_member: int
    _quant_noise_activations: ActivationNoise | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with the noisy weight of Eq. 7 in the weight's place."""
        noise = self._quant_noise_weight
        if not self.training or not noise.active:
            return super().forward(*args, **kwargs)
        if self._quant_noise_activations is not None:
            args = (self._quant_noise_activations(args[0]), *args[1:])
        outer = self.__dict__.get("weight")  # replicas of nn.DataParallel keep their weight here
        noisy = noise.noisy_weight(self.weight, self._quant_noise_layout, self._quant_noise_member)
        # Dynamo follows self.__dict__ only where it is written out: no local name for it.
        self.__dict__["weight"] = noisy
        try:
            return super().forward(*args, **kwargs)
        finally:
            if outer is None:
                del self.__dict__["weight"]
            else:
                self.__dict__["weight"] = outer


class QuantNoiseLookup(QuantNoiseLayer):
    """Mixin of a noisy lookup table: only the rows that are looked up get noise."""

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up; the noise of section 4.1 falls on them alone."""
        noise = self._quant_noise_weight
        # max_norm shrinks rows of the parameter itself, which a noisy copy would keep from it.
        rows_only = self.max_norm is not None or 0 < input.numel() < self.num_embeddings
        if not rows_only or not self.training or not noise.active:
            return super().forward(input)
        values = nn.Embedding.forward(self, input)
        return noise.noisy_rows(values, input, self._quant_noise_member)


@cache
def noisy_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The noisy subclass of a layer class.

    A table with a forward of its own (an offset, a scale) keeps it, and gets a noisy table.
    """
    mixin = QuantNoiseLookup if cls.forward is nn.Embedding.forward else QuantNoiseLayer
    layout = next(layout for layout in LAYER_TYPES if issubclass(cls, layout.layer_class))
    return make_dynamic_subclass("QN", cls, (mixin, cls), noisy_class, _quant_noise_layout=layout)


def is_noisy(module: nn.Module) -> bool:
    """Whether a module is a noisy layer."""
    return isinstance(module, QuantNoiseLayer)


def make_noisy(
    module: nn.Module,
    noise: WeightNoise,
    member: int = 0,
    activations: ActivationNoise | None = None,
) -> None:
    """Turns a layer into a noisy one, in place.

    Args:
        module: a layer that ``layer_types.layer_type_of`` knows.
        noise: the noise of its weight.
        member: number of the layer among those that hold the same weight.
        activations: what is done to its input, or None.
    """
    assert layer_type_of(module) is not None and not is_noisy(module)
    module.__dict__[_NOISE] = noise
    module.__dict__[_MEMBER] = member
    module.__dict__[_ACTIVATIONS] = activations
    module.__class__ = noisy_class(type(module))


def make_clean(module: nn.Module) -> None:
    """The inverse of :func:`make_noisy`: the same object with its original class."""
    module.__class__ = type(module).original_class
    for name in (_NOISE, _MEMBER, _ACTIVATIONS):
        module.__dict__.pop(name)
