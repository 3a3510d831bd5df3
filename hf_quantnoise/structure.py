"""Which layers a model has: their structure group, ties and order, for any architecture.

Nothing here knows an architecture by name. A layer's group is read off the module tree: what lies
below a class or attribute called attention is attention; lookup tables and convolutions are groups
of their own; any other matrix inside a repeated layer is the feed-forward part; what is left is the
head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .blocks import LAYOUTS, WeightLayout, kernel_area, layout_of, matrix_shape

logger = logging.get_logger(__name__)

GROUPS = ("ffn", "attention", "embeddings", "head", "conv")
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class LayerInfo:
    """One layer whose weight can be noised or quantized.

    Attributes:
        name: path of the module in the model.
        module: the layer.
        group: structure group, one of :data:`GROUPS`.
        layout: how its weight becomes a matrix.
        rows, columns: shape of that matrix.
        ties: names of the other layers that hold the very same Parameter.
        input_table: True for the table of ``get_input_embeddings`` and what is tied to it.
    """

    name: str
    module: nn.Module = field(repr=False)
    group: str
    layout: WeightLayout = field(repr=False)
    rows: int
    columns: int
    ties: tuple[str, ...] = ()
    input_table: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


def _paths_with_classes(model: nn.Module, name: str) -> Iterable[str]:
    """Attribute names and class names on the way from the root (excluded) to a layer."""
    module = model
    for part in name.split("."):
        module = getattr(module, part)
        yield part
        yield type(module).__name__


def _inside_repeated_layer(model: nn.Module, name: str) -> bool:
    module: nn.Module = model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        if isinstance(module, nn.ModuleList):
            return True
    return False


def group_of(model: nn.Module, name: str, layer: nn.Module) -> str:
    """The structure group of the layer called ``name`` in ``model``."""
    if any(_ATTENTION.search(part) for part in _paths_with_classes(model, name)):
        return "attention"
    if isinstance(layer, nn.Embedding):
        return "embeddings"
    if isinstance(layer, nn.Conv2d):
        return "conv"
    return "ffn" if _inside_repeated_layer(model, name) else "head"


def _input_tables(model: nn.Module) -> set[int]:
    """Ids of the weights that any (sub-)model calls its input embeddings."""
    tables = set()
    for module in model.modules():
        if not hasattr(module, "get_input_embeddings"):
            continue
        try:
            inputs = module.get_input_embeddings()
        except NotImplementedError:  # image models have none
            continue
        if isinstance(inputs, nn.Embedding):
            tables.add(id(inputs._parameters.get("weight")))
    return tables


def unsaved_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors that ``save_pretrained`` leaves out, as the model computes them anew
    (Marian's sinusoids)."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def is_layer(module: nn.Module) -> bool:
    """Whether the package has a blocking rule for a module, and it holds its weight itself."""
    return layout_of(module) is not None and module._parameters.get("weight") is not None


def find_layers(model: nn.Module) -> list[LayerInfo]:
    """All layers the package has a blocking rule for, in the order of the module tree.

    A layer tied to a table belongs to the table's group (``embeddings``). Layers whose weight is
    already computed by something else (packed, a ``torch`` parametrization, sinusoids that no
    checkpoint holds) are left out.
    """
    unsaved = unsaved_tensors(model)
    tables = {
        id(module._parameters.get("weight"))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    input_ids = _input_tables(model)

    found: list[tuple[str, nn.Module]] = []
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if not name or not is_layer(module) or f"{name}.weight" in unsaved:
            continue
        found.append((name, module))
        users.setdefault(id(module._parameters["weight"]), []).append(name)

    layers = []
    for name, module in found:
        key = id(module._parameters["weight"])
        tied_to_table = key in tables and not isinstance(module, nn.Embedding)
        rows, columns = matrix_shape(module)
        layers.append(
            LayerInfo(
                name=name,
                module=module,
                group="embeddings" if tied_to_table else group_of(model, name, module),
                layout=layout_of(module),
                rows=rows,
                columns=columns,
                ties=tuple(other for other in users[key] if other != name),
                input_table=key in input_ids,
            )
        )
    return layers


def find_stacks(model: nn.Module) -> list[list[str]]:
    """The stacks of repeated layers (encoder, decoder, or both), each as the names of its layers in
    order: lists of two or more layers of one class that transformers can checkpoint one by one."""
    stacks = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        first = type(module[0])
        if issubclass(first, GradientCheckpointingLayer) and all(type(m) is first for m in module):
            stacks.append([f"{name}.{number}" for number in range(len(module))])
    return stacks


# Weights outside of known layers are named wherever they are; from this share of all weights on
# they are worth a warning.
NOTABLE_SHARE = 0.01


def unsupported_weights(model: nn.Module) -> dict[str, str]:
    """Parameters of two or more dimensions that belong to no layer the package can block, such as
    ``in_proj_weight`` of ``nn.MultiheadAttention`` or the fused experts of a mixture.

    Returns:
        Parameter name -> why it is left alone, with its share of all weights.
    """
    known = {id(layer.module._parameters["weight"]) for layer in find_layers(model)}
    unsaved = unsaved_tensors(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    others = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point() and id(parameter) not in known:
            share = parameter.numel() / total
            others[name] = f"{_why_no_layer(model, name)} ({share:.1%} of the weights)"
            if share >= NOTABLE_SHARE and name not in unsaved:
                logger.warning("left alone: %s: %s", name, others[name])
    return others


def _why_no_layer(model: nn.Module, name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, ParametrizationList):
        return "a torch parametrization makes the weight of it"
    if name in unsaved_tensors(model):
        return "the model computes it, no checkpoint holds it"
    kind = type(module).__name__
    if leaf == "weight":
        return f"{kind} is a layer without a blocking rule"
    return f"{kind} holds it as a bare parameter, which has no blocking rule"


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """PEFT's contract: a string is a regex for the whole name, a list holds names and suffixes."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def require_match(
    field_name: str, patterns: str | Sequence[str], names: Sequence[str]
) -> list[str]:
    """The names that patterns match, in order.

    Raises:
        ValueError: naming the field, if one of the patterns matches none.
    """
    wanted = [patterns] if isinstance(patterns, str) else [[pattern] for pattern in patterns]
    for pattern in wanted:
        if not any(matches(name, pattern) for name in names):
            shown = pattern if isinstance(pattern, str) else pattern[0]
            raise ValueError(
                f"{field_name}={shown!r} matches no layer of the model. A string is a regex for "
                f"the whole name, a list holds exact names and suffixes. The model has "
                f"{', '.join(names[:6])}, ..."
            )
    return [name for name in names if matches(name, patterns)]


def select_layers(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> list[LayerInfo]:
    """The layers chosen by PEFT's contract, closed over ties (a pair is chosen or left as one).

    Args:
        target_modules: which layers to take; None takes all.
        exclude_modules: which of them to leave; wins over ``target_modules`` and over ties.

    Raises:
        ValueError: if the model has no layer to choose from, or a pattern matches none.
    """
    layers = find_layers(model)
    if not layers:
        known = ", ".join(layout.base.__name__ for layout in LAYOUTS)
        raise ValueError(f"{type(model).__name__} has no layer that can be blocked ({known})")
    names = [layer.name for layer in layers]
    chosen, excluded = set(names), set()
    if target_modules is not None:
        chosen = set(require_match("target_modules", target_modules, names))
    if exclude_modules is not None:
        excluded = set(require_match("exclude_modules", exclude_modules, names))
    return [
        layer
        for layer in layers
        if (layer.name in chosen or chosen.intersection(layer.ties))
        and layer.name not in excluded
        and not excluded.intersection(layer.ties)
    ]


def _key_for(value: dict[str, int], layer: LayerInfo) -> str | None:
    for key in value:
        if key not in GROUPS and any(re.fullmatch(key, n) for n in (layer.name, *layer.ties)):
            return key
    return layer.group if layer.group in value else None


def entry_for(value: int | dict[str, int], layer: LayerInfo) -> int | None:
    """What an int-or-dict setting gives a layer.

    Keys of a dict are structure groups or regexes for whole layer names; a regex wins over a group.
    None where no key holds.
    """
    return value.get(_key_for(value, layer)) if isinstance(value, dict) else value


def block_size_of(value: int | dict[str, int], layer: LayerInfo) -> int | None:
    """As :func:`entry_for`, with the paper's rule for convolutions (section 7.8): one with a kernel
    of several numbers has its area as block size, unless a regex says otherwise."""
    size, area = entry_for(value, layer), kernel_area(layer.module)
    by_regex = isinstance(value, dict) and _key_for(value, layer) not in GROUPS
    return size if size is None or area == 1 or by_regex else area
