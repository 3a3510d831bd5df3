"""LayerDrop, the noise of pruning (sections 4.2 and 7.9): whole layers are skipped while training.

A layer of a stack becomes a subclass of its own class, as noisy layers do; nothing is registered.
What a skipped layer must return is learned in the first forward, if need be in a trial. Its hidden
states come back as they went in; what else it was given and returned likewise; what it made itself
(attention weights) becomes None. A layer that made something another one reads (T5's position bias)
is never skipped.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from ..distributed import is_distributed
from ..dynamic_subclass import DynamicSubclass, make_dynamic_subclass
from ..sharing import Chunk
from ..structure import find_stacks
from .block_mask import SharedMaskSampler
from .operator import StraightThrough

logger = logging.get_logger(__name__)

_DROP = "_layer_drop"
_PLAN = "_layer_drop_plan"
_DRAW = "_layer_drop_draw"
_MEMBER = "_layer_drop_member"
HIDDEN = "hidden_states"


class LayerDrop:
    """The rate of a model's stacks, shared by all their layers.

    Attributes:
        rate: probability with which each layer is skipped, in each forward of its own.
        straight_through: whether gradients flow as if nothing was skipped (table 11), which costs
            the layer's forward and backward all the same.
        chunks: names of the layers that are skipped as one, from :func:`droppable_chunks`.
    """

    def __init__(
        self, rate: float, straight_through: bool = False, chunks: Sequence[Chunk] = ()
    ) -> None:
        self.rate = rate
        self.straight_through = straight_through
        self.chunks = list(chunks)
        self._made: list[tuple[weakref.ref, DroppableLayer]] = []

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_made": []}

    def makers_of(self, given: Iterable[Any]) -> list[DroppableLayer]:
        """The layers that made one of the tensors which another layer is given."""
        ids = {id(value) for value in given if value is not None}
        return [layer for made, layer in self._made if id(made()) in ids]

    def remember(self, made: Iterable[Any], layer: DroppableLayer) -> None:
        """Notes what a layer made itself, beside its hidden states."""
        self._made += [(weakref.ref(value), layer) for value in made if isinstance(value, Tensor)]


@dataclass(frozen=True)
class SkipPlan:
    """What a skipped layer returns.

    Attributes:
        in_tuple: whether the hidden states stand in a tuple.
        others: for each element behind them, the argument (position or name) it is, or None.
        makes: whether the layer made one of them itself.
    """

    in_tuple: bool
    others: tuple[int | str | None, ...] = ()
    makes: bool = False


class _Skip(torch.autograd.Function):
    """Identity that gives a layer's parameters zero gradients: DDP waits for every parameter."""

    @staticmethod
    def forward(ctx, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class DroppableLayer(DynamicSubclass):
    """Mixin of a layer that may be skipped."""

    _layer_drop: LayerDrop
    _layer_drop_draw: SharedMaskSampler
    _layer_drop_member: int
    _layer_drop_plan: SkipPlan | str | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward; in training, now and then, the hidden states as they came."""
        drop = self._layer_drop
        if not self.training or drop.rate <= 0:
            return super().forward(*args, **kwargs)
        # By the CPU's generator, which gradient checkpointing restores for its recomputation.
        seed = self._layer_drop_draw.seed_for(self._layer_drop_member)
        skip = bool(torch.rand((), generator=torch.Generator().manual_seed(seed)) < drop.rate)
        if skip and self._layer_drop_plan is None:
            skip = self._may_skip_now(args, kwargs)
        plan = self._layer_drop_plan
        if not skip or not isinstance(plan, SkipPlan):
            outputs = super().forward(*args, **kwargs)
            if plan is None:
                self._learn(args, kwargs, outputs)
            return outputs
        hidden = args[0] if args else kwargs[HIDDEN]
        if drop.straight_through:
            outputs = super().forward(*args, **kwargs)
            kept = StraightThrough.apply(_hidden_of(outputs), hidden)
        else:
            kept = self._skipped(hidden)
        given = _given(args, kwargs)
        others = [None if key is None else given[key] for key in plan.others]
        return (kept, *others) if plan.in_tuple else kept

    def _skipped(self, hidden: Tensor) -> Tensor:
        if not is_distributed():
            return hidden
        return _Skip.apply(hidden, *(p for p in self.parameters() if p.requires_grad))

    def _may_skip_now(self, args: tuple, kwargs: dict) -> bool:
        """Tries the layer out, leaving no trace, so that a resumed run skips in its first forward
        what an undisturbed one does. What it makes itself a layer not seen yet may read."""
        args = tuple(map(_cache_copied, args))
        kwargs = {name: _cache_copied(value) for name, value in kwargs.items()}
        with torch.no_grad(), torch.random.fork_rng():
            self._learn(args, kwargs, super().forward(*args, **kwargs))
        plan = self._layer_drop_plan
        if isinstance(plan, SkipPlan) and plan.makes:
            self.__dict__[_PLAN] = None  # what it makes now, others are to be seen reading
        return isinstance(self._layer_drop_plan, SkipPlan)

    def _learn(self, args: tuple, kwargs: dict, outputs: Any) -> None:
        drop, given = self._layer_drop, _given(args, kwargs)
        for maker in drop.makers_of(given.values()):
            maker._never_skip("another layer reads what it makes")
        plan = _plan_of(args, kwargs, outputs)
        if isinstance(plan, str):
            return self._never_skip(plan)
        self.__dict__[_PLAN] = plan
        if plan.in_tuple:
            made = [o for o, key in zip(outputs[1:], plan.others, strict=True) if key is None]
            drop.remember(made, self)

    def _never_skip(self, reason: str) -> None:
        if not isinstance(self._layer_drop_plan, str):
            logger.warning("layerdrop never skips a %s: %s", self.original_class.__name__, reason)
        self.__dict__[_PLAN] = reason


def _cache_copied(value: Any) -> Any:
    """A cache that can be written without a trace (its tensors are those of the original); anything
    else as it is."""
    if not isinstance(value, Cache | CacheLayerMixin):
        return value
    twin = copy.copy(value)
    for name, part in vars(value).items():
        if isinstance(part, list):
            twin.__dict__[name] = [_cache_copied(each) for each in part]
        else:
            twin.__dict__[name] = dict(part) if isinstance(part, dict) else _cache_copied(part)
    return twin


def _hidden_of(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _given(args: Sequence, kwargs: Mapping) -> dict[Any, Any]:
    return {**dict(enumerate(args)), **kwargs}


def _plan_of(args: tuple, kwargs: dict, outputs: Any) -> SkipPlan | str:
    """The plan that follows from one forward, or why the layer cannot be skipped."""
    if not args and HIDDEN not in kwargs:
        return f"it is called without {HIDDEN}"
    hidden, result = args[0] if args else kwargs[HIDDEN], _hidden_of(outputs)
    if not isinstance(result, Tensor) or not isinstance(hidden, Tensor):
        return f"it returns a {type(result).__name__} for a {type(hidden).__name__}"
    if result.shape != hidden.shape:
        return f"it turns {tuple(hidden.shape)} into {tuple(result.shape)}"
    if not isinstance(outputs, tuple):
        return SkipPlan(in_tuple=False)
    given = [(key, value) for key, value in _given(args, kwargs).items() if value is not None]
    others = tuple(
        next((key for key, value in given if value is element), None) for element in outputs[1:]
    )
    made = [key is None and o is not None for o, key in zip(outputs[1:], others, strict=True)]
    return SkipPlan(in_tuple=True, others=others, makes=any(made))


@cache
def droppable_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The droppable subclass of a layer class."""
    return make_dynamic_subclass("Droppable", cls, (DroppableLayer, cls), droppable_class)


def droppable_chunks(model: nn.Module, chunks: Sequence[Chunk], rate: float) -> list[Chunk]:
    """What is skipped as one: the chunks of shared layers, and single layers of the stacks.

    Args:
        model: any model.
        chunks: the chunks of layers that share their weights.
        rate: named in the error.

    Raises:
        ValueError: if the model has no stack.
    """
    names = [name for stack in find_stacks(model) for name in stack]
    if not names:
        raise ValueError(
            f"layerdrop={rate!r}: {type(model).__name__} has no stack of two or more like layers "
            "that could be skipped (layers of one shared weight and convolutional stages cannot); "
            "set layerdrop=0"
        )
    stacked = [chunk for chunk in chunks if set(chunk) <= set(names)]
    shared = {name for chunk in stacked for name in chunk}
    return [*stacked, *((name,) for name in names if name not in shared)]


def make_droppable(model: nn.Module, drop: LayerDrop) -> None:
    """Turns the layers of a model's chunks into droppable ones, in place."""
    for chunk in drop.chunks:
        shared_draw = SharedMaskSampler(len(chunk))
        for member, name in enumerate(chunk):
            layer = model.get_submodule(name)
            attributes = {_DROP: drop, _PLAN: None, _DRAW: shared_draw, _MEMBER: member}
            layer.__dict__.update(attributes)
            layer.__class__ = droppable_class(type(layer))


def make_undroppable(model: nn.Module) -> None:
    """The inverse of :func:`make_droppable`."""
    for module in model.modules():
        if isinstance(module, DroppableLayer):
            module.__class__ = type(module).original_class
            for name in (_DROP, _PLAN, _DRAW, _MEMBER):
                module.__dict__.pop(name)
