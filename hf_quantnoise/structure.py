"""The layers of a model: their structure group, ties and order, for any architecture.

A layer's group follows from the module tree. Layers inside a class or attribute called attention
are attention; tables and convolutions are separate groups; other layers inside a repeated layer are
the feed-forward part; all others are the head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.utils import logging

from .blocks import matrix_shape
from .compat import GradientCheckpointingLayer, ignored_on_save, own_parameters
from .layer_types import GROUPS, LAYER_TYPES, LayerType, known_layer_type, layer_type_of
from .patterns import compile_pattern

logger = logging.get_logger(__name__)

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class LayerInfo:
    """A layer whose weight can be noised or quantized.

    Attributes:
        name: path of the module in the model.
        group: structure group, one of :data:`GROUPS`.
        rows, columns: shape of its weight as a matrix.
        ties: names of the other layers that hold the same Parameter.
        input_table: whether it is the table of ``get_input_embeddings``, or tied to it.
    """

    name: str
    module: nn.Module = field(repr=False)
    group: str
    layer_type: LayerType = field(repr=False)
    rows: int
    columns: int
    ties: tuple[str, ...] = ()
    input_table: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


def group_of(model: nn.Module, name: str, layer: nn.Module) -> str:
    """Return the structure group of the layer called ``name`` in ``model``."""
    path: list[nn.Module] = []
    for part in name.split("."):
        path.append(getattr(path[-1] if path else model, part))
        if _ATTENTION.search(part) or _ATTENTION.search(type(path[-1]).__name__):
            return "attention"
    if group := known_layer_type(layer).group:
        return group
    is_repeated = any(isinstance(module, nn.ModuleList) for module in path[:-1])
    return "ffn" if is_repeated else "head"


def _input_tables(model: nn.Module) -> set[int]:
    """Return the ids of the weights that a model or sub-model uses as input embeddings."""
    tables = set()
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            with suppress(NotImplementedError):  # image models
                inputs = module.get_input_embeddings()
                if isinstance(inputs, nn.Embedding):
                    tables.add(id(own_parameters(inputs).get("weight")))
    return tables


def is_layer(module: nn.Module) -> bool:
    """Return whether a module has a known type and holds its weight itself."""
    return layer_type_of(module) is not None and own_parameters(module).get("weight") is not None


def _has_values(layer: nn.Module) -> bool:
    return 0 not in own_parameters(layer)["weight"].shape


def find_layers(model: nn.Module) -> list[LayerInfo]:
    """Return all layers of known types, in the order of the module tree.

    A layer tied to a table has the table's group (``embeddings``). Layers are omitted if they have
    no weight parameter (packed ones, torch parametrizations), never save it (sinusoids), or have no
    values in it (a head for no labels).
    """
    unsaved = ignored_on_save(model)
    input_ids = _input_tables(model)
    found: list[tuple[str, nn.Module]] = []
    users: dict[int, list[str]] = {}
    tables: set[int] = set()
    for name, module in model.named_modules():
        key = id(own_parameters(module).get("weight"))
        if isinstance(module, nn.Embedding):
            tables.add(key)
        if name and is_layer(module) and _has_values(module) and f"{name}.weight" not in unsaved:
            found.append((name, module))
            users.setdefault(key, []).append(name)

    layers = []
    for name, module in found:
        key = id(own_parameters(module)["weight"])
        tied_to_table = key in tables and not isinstance(module, nn.Embedding)
        rows, columns = matrix_shape(module)
        layers.append(
            LayerInfo(
                name=name,
                module=module,
                group="embeddings" if tied_to_table else group_of(model, name, module),
                layer_type=layer_type_of(module),
                rows=rows,
                columns=columns,
                ties=tuple(other for other in users[key] if other != name),
                input_table=key in input_ids,
            )
        )
    return layers


def find_stacks(model: nn.Module) -> list[list[str]]:
    """Return the stacks of repeated layers (encoder, decoder), each as the names of its layers.

    A stack is a list of two or more layers of one class, a ``GradientCheckpointingLayer``.
    """
    stacks = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        first = type(module[0])
        if issubclass(first, GradientCheckpointingLayer) and all(type(m) is first for m in module):
            stacks.append([f"{name}.{number}" for number in range(len(module))])
    return stacks


# Weights of unknown layers are always reported; above this share of all weights, with a warning.
NOTABLE_SHARE = 0.01


def unsupported_weights(model: nn.Module) -> dict[str, str]:
    """Return parameter name -> why it is skipped, for matrices outside of known layers.

    Examples are ``in_proj_weight`` of ``nn.MultiheadAttention`` and the fused experts of a mixture.
    """
    known = {id(own_parameters(layer.module)["weight"]) for layer in find_layers(model)}
    unsaved, notable = ignored_on_save(model), f"more than {NOTABLE_SHARE:.0%} of the weights"
    total = sum(parameter.numel() for parameter in model.parameters())
    others = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point() and id(parameter) not in known:
            share = parameter.numel() / total
            reason = _why_no_layer(model, name)
            others[name] = f"{reason} ({share:.1%} of the weights)"
            if share >= NOTABLE_SHARE and name not in unsaved:
                # Without the share, which changes when layers are packed or pruned.
                logger.warning_once(f"skipped {name}, {notable}: {reason}")
    return others


def _why_no_layer(model: nn.Module, name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, ParametrizationList):
        return "a torch parametrization computes the weight from it"
    if name in ignored_on_save(model):
        return "the model computes it; it is in no checkpoint"
    kind = type(module).__name__
    if leaf == "weight" and is_layer(module):
        return "it has no values"
    if leaf == "weight":
        return f"{kind} is not a known layer type"
    return f"it is a bare parameter of {kind}, not the weight of a known layer type"


def require_match(setting: str, patterns: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that match, in order; raise ValueError if a pattern matches no name.

    As in PEFT, a string is a regex for the full name, a list has names and suffixes.
    """
    if isinstance(patterns, str):
        regex = compile_pattern(setting, patterns)
        matching = [name for name in names if regex.fullmatch(name)]
        unused = None if matching else patterns
    else:
        suffixes = {name: _suffixes(name) for name in names}
        known, wanted = set().union(*suffixes.values()), set(patterns)
        matching = [name for name in names if not wanted.isdisjoint(suffixes[name])]
        unused = next((pattern for pattern in patterns if pattern not in known), None)
    if unused is not None:
        raise ValueError(
            f"{setting}={unused!r} matches no layer of the model ({', '.join(names[:3])}, "
            "...); use a string with a regex for the full name, or a list of names and suffixes"
        )
    return matching


def _suffixes(name: str) -> set[str]:
    """``a.b.c`` -> ``{"a.b.c", "b.c", "c"}``."""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def select_layers(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> list[LayerInfo]:
    """Return the layers that PEFT-style patterns select; tied layers are selected together.

    ``exclude_modules`` takes precedence over ``target_modules`` (None is all layers) and ties.

    Raises:
        ValueError: if the model has no layer of a known type, a pattern matches none, or all are
            excluded.
    """
    layers = find_layers(model)
    if not layers:
        known = ", ".join(known.layer_class.__name__ for known in LAYER_TYPES)
        raise ValueError(
            f"{type(model).__name__} has no layer of a known type, expected at least one of {known}"
        )
    names = [layer.name for layer in layers]
    chosen, excluded = set(names), set()
    if target_modules is not None:
        chosen = set(require_match("target_modules", target_modules, names))
        if not chosen:
            raise ValueError(
                f"invalid target_modules={target_modules!r}: it selects no layer, expected at "
                "least one pattern; set target_modules=None for all layers"
            )
    if exclude_modules is not None:
        excluded = set(require_match("exclude_modules", exclude_modules, names))
    tied = ((layer, {layer.name, *layer.ties}) for layer in layers)
    selected = [layer for layer, names in tied if names & chosen and not names & excluded]
    if not selected:
        raise ValueError(
            f"invalid exclude_modules={exclude_modules!r}: it excludes every layer that "
            f"target_modules={target_modules!r} selects; use a narrower pattern"
        )
    return selected


def _key_for(value: dict[str, int], layer: LayerInfo) -> str | None:
    for key in value:
        if key not in GROUPS:
            regex = compile_pattern("key of block_size or n_centroids", key)
            if any(map(regex.fullmatch, (layer.name, *layer.ties))):
                return key
    return layer.group if layer.group in value else None


def weights_of(layers: Sequence[LayerInfo]) -> list[tuple[LayerInfo, ...]]:
    """Return the weights of some layers, each as the tuple of the layers that hold it."""
    by_name = {layer.name: layer for layer in layers}
    weights: dict[frozenset[str], tuple[LayerInfo, ...]] = {}
    for layer in layers:
        names = (layer.name, *layer.ties)
        weights.setdefault(frozenset(names), tuple(by_name[name] for name in names))
    return list(weights.values())


def entry_for(value: int | dict[str, int], layer: LayerInfo) -> int | None:
    """Return the value of an int-or-dict setting for a layer, or None if no key matches.

    Keys are structure groups or regexes for full layer names; a regex takes precedence.
    """
    return value.get(_key_for(value, layer)) if isinstance(value, dict) else value


def block_size_of(value: int | dict[str, int], layer: LayerInfo) -> int | None:
    """Return the block size of a layer: :func:`entry_for`, or the kernel block of a convolution.

    The latter (section 7.8) applies unless a regex matches the layer.
    """
    size, block = entry_for(value, layer), layer.layer_type.kernel_block(layer.module)
    by_regex = isinstance(value, dict) and _key_for(value, layer) not in GROUPS
    return size if size is None or block == 1 or by_regex else block


def stage_of(layer: LayerInfo, stages: Sequence[str | None]) -> str | bool | None:
    """Return the stage of a layer and its ties (regexes precede groups), or False if none."""
    for stage in stages:
        if stage is None or stage in GROUPS:
            continue
        if any(map(compile_pattern("stages", stage).fullmatch, (layer.name, *layer.ties))):
            return stage
    if layer.group in stages:
        return layer.group
    return None if None in stages else False
