"""Pruning of complete layers (Every Other Layer, section 7.9), with an updated model config.

No architecture is known by name. The config field that holds the number of layers of a stack is
found by trial: models are built on the meta device from modified configs, until one has the same
tensors as the pruned model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .sharing import Chunk, chunks_by_stack
from .structure import find_stacks, require_match

EVERY_OTHER = "every_other"
_COUNTS = ("layer", "depth", "block")


def layers_to_prune(
    model: nn.Module, prune_layers: str | Sequence[str], chunks: Sequence[Chunk] = ()
) -> list[str]:
    """Return the names of the layers to prune.

    ``prune_layers`` is a regex for full layer names, a list of exact names and suffixes, or
    ``"every_other"`` for every second chunk of shared layers in each stack: of layers A to H in
    chunks of two, C, D, G and H. A layer that shares no weights is a chunk by itself.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise ValueError(
            f"invalid prune_layers={prune_layers!r}: {type(model).__name__} has no stack of two or "
            "more similar layers (layers with one shared weight and convolutional stages do not "
            "count); set prune_layers=None"
        )
    if prune_layers == EVERY_OTHER:
        of_stacks = chunks_by_stack(stacks, chunks)
        return [name for in_stack in of_stacks for chunk in in_stack[1::2] for name in chunk]
    names = [name for stack in stacks for name in stack]
    try:
        pruned = require_match("prune_layers", prune_layers, names)
    except ValueError as error:
        raise ValueError(f"{error}, or {EVERY_OTHER!r}") from None
    for stack in stacks:
        if set(stack) <= set(pruned):
            raise ValueError(
                f"invalid prune_layers={prune_layers!r}: it takes all {len(stack)} layers of "
                f"{_stack_name(stack)}; keep at least one"
            )
    return pruned


def _stack_name(layers: Sequence[str]) -> str:
    return layers[0].rpartition(".")[0]


@dataclass(frozen=True)
class Pruning:
    """A pruning that has been checked and can be applied to a model."""

    kept: dict[str, list[int]]  # name of each stack -> indices of the layers that stay
    renamed: dict[str, str]  # old name -> new name of those layers
    skeleton: PreTrainedModel  # the pruned model on the meta device

    def apply(self, model: PreTrainedModel) -> None:
        """Remove the other layers from the model in place, and update its config."""
        for prefix, keep in self.kept.items():
            stack = model.get_submodule(prefix)
            for number in reversed(range(len(stack))):
                if number not in keep:
                    del stack[number]
            for new, old in enumerate(keep):
                fresh = self.skeleton.get_submodule(f"{prefix}.{new}")
                _update_layer_index(stack[new], fresh, old, new)
        _update_config(model, self.skeleton)


def plan_pruning(model: PreTrainedModel, names: Sequence[str]) -> Pruning:
    """Return the pruning of some layers of a dense model, which is not changed."""
    kept: dict[str, list[int]] = {}
    renamed: dict[str, str] = {}
    config = deepcopy(model.config)
    for stack in find_stacks(model):
        prefix = _stack_name(stack)
        kept[prefix] = [n for n, name in enumerate(stack) if name not in names]
        renamed |= {stack[old]: f"{prefix}.{new}" for new, old in enumerate(kept[prefix])}
        if len(kept[prefix]) < len(stack):
            config = _config_with(model, config, prefix, len(stack), kept[prefix])
    skeleton = _skeleton(type(model), config)
    _require_same_tensors(model, skeleton, names, renamed)
    return Pruning(kept, renamed, skeleton)


def _skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model on the meta device, from the config as it is after a JSON round trip."""
    with torch.device("meta"):
        return model_class(type(config).from_dict(config.to_dict()))


def configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and its nested configs (``text_config``, ...)."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_in(value)


def _config_with(
    model: PreTrainedModel, config: PreTrainedConfig, prefix: str, count: int, kept: list[int]
) -> PreTrainedConfig:
    """Return the config with ``len(kept)`` layers in one stack, and no other stack changed."""
    stacks = find_stacks(_skeleton(type(model), config))
    lengths = {_stack_name(stack): len(stack) for stack in stacks}
    wanted = {**lengths, prefix: len(kept)}
    for number, part in enumerate(configs_in(config)):
        for field, value in vars(part).items():
            if value != count or type(value) is not int or not _counts_layers(field):
                continue
            trial = deepcopy(config)
            _shorten(list(configs_in(trial))[number], field, count, kept)
            try:
                built = _skeleton(type(model), trial)
            except Exception:  # a class may reject a count with any error
                continue
            if all(len(built.get_submodule(name)) == n for name, n in wanted.items()):
                return trial
    raise ValueError(
        f"invalid prune_layers: no field of {type(config).__name__} sets only the number of layers "
        f"of {prefix}, so the pruned model could not be loaded; keep its {count} layers"
    )


def _counts_layers(field: str) -> bool:
    return any(word in field for word in _COUNTS)


def _shorten(config: PreTrainedConfig, field: str, count: int, kept: list[int]) -> None:
    """Set the number of layers, and reduce lists with an entry per layer to the kept ones."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count and _counts_layers(name):
            setattr(config, name, type(value)(value[number] for number in kept))
    setattr(config, field, len(kept))


def _require_same_tensors(
    model: PreTrainedModel, skeleton: PreTrainedModel, names: Sequence[str], renamed: dict[str, str]
) -> None:
    pruned = {
        _new_name(name, renamed): tuple(tensor.shape)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not any(name.startswith(f"{layer}.") for layer in names)
    }
    built = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    names_in_either = pruned.keys() | built.keys()
    different = sorted(n for n in names_in_either if pruned.get(n) != built.get(n))
    if different:
        raise ValueError(
            f"invalid prune_layers: a {type(model).__name__} without these {len(names)} layers "
            f"differs in {', '.join(different[:3])} from every model that its config can describe "
            "(a first layer often has extra tensors); keep that layer and choose other layers"
        )


def _new_name(name: str, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def _update_layer_index(layer: nn.Module, fresh: nn.Module, old: int, new: int) -> None:
    """Update the index in the stack that modules store (``layer_idx``), as in a fresh model."""
    fresh_modules = dict(fresh.named_modules())
    for name, module in layer.named_modules():
        for attribute, value in vars(module).items():
            index = vars(fresh_modules[name]).get(attribute)
            if type(value) is int and type(index) is int and (value, index) == (old, new):
                module.__dict__[attribute] = new


def _update_config(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Copy layer counts and lists from the skeleton's configs to those of the model."""
    fresh_modules = dict(skeleton.named_modules())
    for name, module in model.named_modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            configs = configs_in(module.config), configs_in(fresh_modules[name].config)
            for config, fresh in zip(*configs, strict=True):
                for field, value in vars(fresh).items():
                    if _counts_layers(field) and vars(config).get(field) != value:
                        setattr(config, field, value)
