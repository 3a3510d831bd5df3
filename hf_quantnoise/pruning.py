"""Whole layers taken out of a model (Every Other Layer, section 7.9), its config in step.

No architecture is known by name here. Which field of the config counts a stack's layers is found by
trial: models are built without memory (on the ``meta`` device) from changed configs, until one has
the very tensors of the pruned model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .sharing import Chunk
from .structure import find_stacks, require_match

EVERY_OTHER = "every_other"
_COUNTS = ("layer", "depth", "block")


def layers_to_prune(
    model: nn.Module, prune_layers: str | Sequence[str], chunks: Sequence[Chunk] = ()
) -> list[str]:
    """The names of the layers that are to go.

    Args:
        model: any model.
        prune_layers: ``"every_other"`` takes every second chunk of each stack, the second first: of
            layers A to H in chunks of two, C, D, G and H go. Otherwise a regex for whole names of
            layers, or a list of exact names and suffixes.
        chunks: the chunks of shared layers; without them each layer is one.

    Raises:
        ValueError: if the model has no stack, a pattern matches none of its layers, or a stack
            would be left empty.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise ValueError(
            f"prune_layers={prune_layers!r}: {type(model).__name__} has no stack of two or more "
            "like layers (layers of one shared weight and convolutional stages are none); set "
            "prune_layers=None"
        )
    if prune_layers == EVERY_OTHER:
        return _every_other(stacks, chunks)
    names = [name for stack in stacks for name in stack]
    try:
        pruned = require_match("prune_layers", prune_layers, names)
    except ValueError as error:
        raise ValueError(f"{error} {EVERY_OTHER!r} takes every second chunk.") from None
    for stack in stacks:
        if set(stack) <= set(pruned):
            raise ValueError(
                f"prune_layers={prune_layers!r} takes all {len(stack)} layers of "
                f"{_stack_of(stack)}; leave at least one"
            )
    return pruned


def _stack_of(layers: Sequence[str]) -> str:
    """The name of a stack, by those of its layers."""
    return layers[0].rpartition(".")[0]


def _every_other(stacks: list[list[str]], chunks: Sequence[Chunk]) -> list[str]:
    pruned = []
    for stack in stacks:
        own = [chunk for chunk in chunks if chunk[0] in stack] or [(name,) for name in stack]
        pruned += [name for chunk in own[1::2] for name in chunk]
    return pruned


@dataclass(frozen=True)
class Pruning:
    """How a model is pruned, found out before it is touched.

    Attributes:
        kept: name of each stack -> places of the layers that stay.
        renamed: old name -> new name of those layers.
        skeleton: the pruned model, without memory.
    """

    kept: dict[str, list[int]]
    renamed: dict[str, str]
    skeleton: PreTrainedModel

    def carry_out(self, model: PreTrainedModel) -> None:
        """Takes the other layers out of the model, in place, and sets its config accordingly."""
        for prefix, keep in self.kept.items():
            stack = model.get_submodule(prefix)
            for number in reversed(range(len(stack))):
                if number not in keep:
                    del stack[number]
            for new, old in enumerate(keep):
                twin = self.skeleton.get_submodule(f"{prefix}.{new}")
                _renumber(stack[new], twin, old, new)
        _take_over(model, self.skeleton)


def plan_pruning(model: PreTrainedModel, names: Sequence[str]) -> Pruning:
    """How to take layers out of a model, which is left as it is.

    Args:
        model: a dense model.
        names: the layers, from :func:`layers_to_prune`.

    Raises:
        ValueError: if no config of the model's class describes what would be left.
    """
    kept: dict[str, list[int]] = {}
    renamed: dict[str, str] = {}
    config = deepcopy(model.config)
    for stack in find_stacks(model):
        prefix = _stack_of(stack)
        kept[prefix] = [n for n, name in enumerate(stack) if name not in names]
        renamed |= {stack[old]: f"{prefix}.{new}" for new, old in enumerate(kept[prefix])}
        if len(kept[prefix]) < len(stack):
            config = _config_with(model, config, prefix, len(stack), kept[prefix])
    skeleton = _skeleton(type(model), config)
    _require_same_tensors(model, skeleton, names, renamed)
    return Pruning(kept, renamed, skeleton)


def _skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory from a config that went through JSON, as a reloaded one does."""
    reread = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        return model_class(reread)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those inside it (``text_config``, ...)."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _config_with(
    model: PreTrainedModel, config: PreTrainedConfig, prefix: str, count: int, kept: list[int]
) -> PreTrainedConfig:
    """The config under which one stack has ``len(kept)`` layers and no other is changed."""
    stacks = find_stacks(_skeleton(type(model), config))
    lengths = {_stack_of(stack): len(stack) for stack in stacks}
    wanted = {**lengths, prefix: len(kept)}
    for number, part in enumerate(_configs(config)):
        for field, value in vars(part).items():
            if value != count or type(value) is not int or not _counts_layers(field):
                continue
            trial = deepcopy(config)
            _shorten(list(_configs(trial))[number], field, count, kept)
            try:
                built = _skeleton(type(model), trial)
            except Exception:  # any class may refuse a count in its own way
                continue
            if all(len(built.get_submodule(name)) == n for name, n in wanted.items()):
                return trial
    raise ValueError(
        f"prune_layers: no field of {type(config).__name__} sets the number of layers of {prefix} "
        f"alone, so the pruned model could not be loaded; leave its {count} layers"
    )


def _counts_layers(field: str) -> bool:
    return any(word in field for word in _COUNTS)


def _shorten(config: PreTrainedConfig, field: str, count: int, kept: list[int]) -> None:
    """Sets a count, and keeps of every list with an entry per layer those of the kept layers."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count and _counts_layers(name):
            setattr(config, name, type(value)(value[number] for number in kept))
    setattr(config, field, len(kept))


def _require_same_tensors(
    model: PreTrainedModel,
    skeleton: PreTrainedModel,
    names: Sequence[str],
    renamed: dict[str, str],
) -> None:
    left = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(name.startswith(f"{layer}.") for layer in names):
            left[_new_name(name, renamed)] = tuple(tensor.shape)
    built = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    odd = sorted(name for name in left.keys() | built.keys() if left.get(name) != built.get(name))
    if odd:
        raise ValueError(
            f"prune_layers: a {type(model).__name__} without these {len(names)} layers differs in "
            f"{', '.join(odd[:3])} from any that its config can describe (a first layer often has "
            "tensors of its own); keep it, and choose other layers"
        )


def _new_name(name: str, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def _renumber(layer: nn.Module, twin: nn.Module, old: int, new: int) -> None:
    """Places in the stack that modules remember (``layer_idx`` of a cache), as in a fresh model."""
    twins = dict(twin.named_modules())
    for name, module in layer.named_modules():
        for attribute, value in vars(module).items():
            fresh = vars(twins[name]).get(attribute)
            if type(value) is int and type(fresh) is int and (value, fresh) == (old, new):
                module.__dict__[attribute] = new


def _take_over(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Counts and lists of the skeleton's configs, into those that the model's modules hold."""
    twins = dict(skeleton.named_modules())
    for name, module in model.named_modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            for own, fresh in zip(
                _configs(module.config), _configs(twins[name].config), strict=True
            ):
                for field, value in vars(fresh).items():
                    if _counts_layers(field) and vars(own).get(field) != value:
                        setattr(own, field, value)
