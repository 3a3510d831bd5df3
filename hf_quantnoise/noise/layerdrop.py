"""LayerDrop, the noise of pruning (sections 4.2 and 7.9): layers are skipped during training.

The class of each layer of a stack becomes a dynamic subclass, as for noisy layers; nothing is
registered. The outputs of a skipped layer are derived from its first forward, or from a
trial forward: hidden states are returned unchanged, other inputs that the layer passes through are
passed through, and tensors it creates itself (attention weights) become None. A layer that creates
a tensor which another layer reads (T5's position bias) is never skipped.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import logging

from ..compat import CacheLayerMixin, in_backward
from ..distributed import is_distributed
from ..dynamic_subclass import DynamicSubclass, change_class, make_dynamic_subclass
from ..module_modes import evaluating
from ..quantizers.base import StraightThrough
from ..sharing import Chunk, chunks_by_stack
from ..structure import find_stacks
from .block_mask import SharedMaskSampler

logger = logging.get_logger(__name__)

HIDDEN = "hidden_states"


@dataclass
class LayerDrop:
    """Settings of LayerDrop, shared by all droppable layers of a model.

    With ``straight_through`` gradients flow as if nothing was skipped (table 11); the layer's
    forward and backward are then computed all the same.
    """

    rate: float  # probability with which each chunk is skipped in a forward
    straight_through: bool
    chunks: list[Chunk]  # layers that are skipped together, from droppable_chunks
    # The tensors that layers created, besides hidden states, and those layers.
    created: list[tuple[weakref.ref, DroppableLayer]] = field(default_factory=list)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "created": []}


@dataclass(frozen=True)
class SkipPlan:
    """The outputs of a skipped layer."""

    # The argument (position or name) that each output after the hidden states equals, or None;
    # None if the hidden states are not in a tuple.
    passed_through: tuple[int | str | None, ...] | None
    creates: bool = False  # whether the layer created one of them itself


@dataclass
class DropState:
    """LayerDrop of one layer.

    ``plan`` holds the outputs of the skipped layer, or why it is never skipped; None if not known.
    """

    drop: LayerDrop
    sampler: SharedMaskSampler  # decides for all layers of the chunk
    member: int  # index of the layer in the chunk
    plan: SkipPlan | str | None = None
    # Seed of the forward in which the layer ran because its plan was not known.
    seed_without_plan: int | None = None

    def sample_seed(self) -> int:
        """Return the seed of the layer's current forward; the same one if it is recomputed."""
        # By the CPU's generator, which gradient checkpointing restores for its recomputation.
        return self.sampler.seed_for(self.member)

    def is_skip(self, seed: int) -> bool:
        """Return whether the forward of this seed skips the layer."""
        if in_backward() and seed == self.seed_without_plan:
            return False  # a recomputation: the plan was set by the forward itself
        generator = torch.Generator().manual_seed(seed)
        return bool(torch.rand((), generator=generator, device="cpu") < self.drop.rate)


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

    _layer_drop: DropState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward; in training, skip it at the rate of LayerDrop."""
        state = self._layer_drop
        if not self.training or state.drop.rate <= 0:
            return super().forward(*args, **kwargs)
        seed = state.sample_seed()
        skip = state.is_skip(seed)
        if skip and state.plan is None:
            skip = self._try_layer(args, kwargs)
        plan = state.plan
        if not skip or not isinstance(plan, SkipPlan):
            outputs = super().forward(*args, **kwargs)
            if plan is None:
                state.seed_without_plan = seed
                self._record_forward(args, kwargs, outputs)
            return outputs
        hidden = args[0] if args else kwargs[HIDDEN]
        if state.drop.straight_through:
            outputs = super().forward(*args, **kwargs)
            computed = outputs[0] if isinstance(outputs, tuple) else outputs
            hidden = StraightThrough.apply(computed, hidden)
        elif is_distributed():
            hidden = _Skip.apply(hidden, *(p for p in self.parameters() if p.requires_grad))
        hidden = hidden.clone()  # the model may change a layer's output in place
        if plan.passed_through is None:
            return hidden
        inputs = _inputs(args, kwargs)
        return (hidden, *(None if key is None else inputs[key] for key in plan.passed_through))

    def _try_layer(self, args: tuple, kwargs: dict) -> bool:
        """Run a trial forward without side effects; return whether the layer may be skipped now.

        A resumed run thus skips in its first forward what an uninterrupted run skips. A layer that
        creates tensors has to wait, because layers that have not run yet may read them. In eval
        mode, statistics of BatchNorm and ranges of activations do not count the trial.
        """
        args = tuple(map(_copy_cache, args))
        kwargs = {name: _copy_cache(value) for name, value in kwargs.items()}
        with torch.no_grad(), torch.random.fork_rng(), evaluating(self):
            self._record_forward(args, kwargs, super().forward(*args, **kwargs))
        plan = self._layer_drop.plan
        if isinstance(plan, SkipPlan) and plan.creates:
            self._layer_drop.plan = None  # decided by the next real forward
        return isinstance(self._layer_drop.plan, SkipPlan)

    def _record_forward(self, args: tuple, kwargs: dict, outputs: Any) -> None:
        """Set the plan from one forward, and mark layers whose created tensors it reads."""
        created = self._layer_drop.drop.created
        ids_read = {id(value) for value in _inputs(args, kwargs).values() if value is not None}
        for tensor, creator in created:
            if id(tensor()) in ids_read:
                creator._never_skip("another layer reads a tensor it creates")
        plan = _plan_of(args, kwargs, outputs)
        if isinstance(plan, str):
            return self._never_skip(plan)
        self._layer_drop.plan = plan
        if plan.creates:
            for out, key in zip(outputs[1:], plan.passed_through, strict=True):
                if key is None and isinstance(out, Tensor):
                    created.append((weakref.ref(out), self))

    def _never_skip(self, reason: str) -> None:
        if not isinstance(self._layer_drop.plan, str):
            logger.warning("layerdrop never skips a %s: %s", self.original_class.__name__, reason)
        self._layer_drop.plan = reason


def _copy_cache(value: Any) -> Any:
    """Return a copy of a cache, whose tensors are shared but can be replaced; else the value."""
    if isinstance(value, list | dict):
        return value.copy() if isinstance(value, dict) else [_copy_cache(part) for part in value]
    if not isinstance(value, Cache | CacheLayerMixin):
        return value
    twin = copy.copy(value)
    vars(twin).update({name: _copy_cache(part) for name, part in vars(value).items()})
    return twin


def _inputs(args: tuple, kwargs: dict) -> dict[int | str, Any]:
    return {**dict(enumerate(args)), **kwargs}


def _plan_of(args: tuple, kwargs: dict, outputs: Any) -> SkipPlan | str:
    """Return the plan that follows from one forward, or why the layer cannot be skipped."""
    if not args and HIDDEN not in kwargs:
        return f"it is called without {HIDDEN}"
    hidden = args[0] if args else kwargs[HIDDEN]
    result = outputs[0] if isinstance(outputs, tuple) else outputs
    if not isinstance(result, Tensor) or not isinstance(hidden, Tensor):
        return f"it returns a {type(result).__name__} for a {type(hidden).__name__}"
    if result.shape != hidden.shape:
        return f"it changes the shape {tuple(hidden.shape)} to {tuple(result.shape)}"
    if not isinstance(outputs, tuple):
        return SkipPlan(None)
    inputs = [(key, value) for key, value in _inputs(args, kwargs).items() if value is not None]
    keys = tuple(next((key for key, value in inputs if value is out), None) for out in outputs[1:])
    created = [key is None and out is not None for out, key in zip(outputs[1:], keys, strict=True)]
    return SkipPlan(keys, any(created))


@cache
def droppable_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the droppable subclass of a layer class."""
    return make_dynamic_subclass("Droppable", cls, (DroppableLayer, cls), droppable_class)


def droppable_chunks(model: nn.Module, chunks: Sequence[Chunk], rate: float) -> list[Chunk]:
    """Return the given chunks of shared layers, and each other layer of the stacks by itself."""
    if not (stacks := find_stacks(model)):
        raise ValueError(
            f"layerdrop={rate!r} needs a stack of two or more similar layers, which "
            f"{type(model).__name__} does not have (repeated layers of one weight and "
            "convolutional stages do not count); set layerdrop=0"
        )
    return [chunk for in_stack in chunks_by_stack(stacks, chunks) for chunk in in_stack]


def make_droppable(model: nn.Module, drop: LayerDrop) -> None:
    """Turn the layers of a model's chunks into droppable ones, in place."""
    for chunk in drop.chunks:
        sampler = SharedMaskSampler(len(chunk))
        for member, name in enumerate(chunk):
            layer = model.get_submodule(name)
            layer.__dict__["_layer_drop"] = DropState(drop, sampler, member)
            change_class(layer, droppable_class(type(layer)))


def make_undroppable(model: nn.Module) -> None:
    """Undo :func:`make_droppable`."""
    for module in model.modules():
        if isinstance(module, DroppableLayer):
            change_class(module, type(module).original_class)
            del module.__dict__["_layer_drop"]
