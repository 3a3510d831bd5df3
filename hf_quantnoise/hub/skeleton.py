"""The skeleton that a checkpoint is read into: a model on the meta device whose layers are those of
the plan, empty, under the names that this class of the model has for them."""

from __future__ import annotations

import re
from copy import copy

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import matrix_shape
from ..configuration import LAYER_KEYS, QuantizedModelConfig
from ..modeling import PackedLayer, is_packed, pack_skeleton, packed_names
from ..modeling.structural_changes import declare_shared, tied_after_loading
from ..modeling.ties import TieRewriter
from ..quantizers import Quantizer, quantizer_from_dict
from ..structure import is_layer, unsaved_tensors

logger = logging.get_logger(__name__)

# Earlier releases take whatever lies in the file of a quantized model.
SHAPES_ARE_CHECKED = Version(transformers.__version__) >= Version("5.23.0")


def entry_quantizer(entry: dict) -> Quantizer:
    """The quantizer that a plan's entry describes."""
    return quantizer_from_dict({k: v for k, v in entry.items() if k not in LAYER_KEYS})


def sentinel_names(config: QuantizedModelConfig, model: nn.Module) -> list[str]:
    """Names of the one-byte tensors that stand in the file where weights were.

    One in each part of the model (a child of the base model, or a head), named as its first packed
    weight: there are classes that lack parts, ``GPT2Model`` the head, ``T5EncoderModel`` the
    decoder. First by name: JSON sorts the plan, so its order is not the order of the stages.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, str] = {}
    for name in sorted(config.plan):
        if "tied_to" not in config.plan[name]:
            part = name.removeprefix(prefix).partition(".")[0]
            names.setdefault(part, f"{name}.weight")
    return list(names.values())


def ignore_sentinels(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Lets the sentinels lie in the file, named with or without the base model's prefix."""
    # The first files had one, in whatever part came first.
    for name in {*sentinel_names(config, model), f"{min(config.plan)}.weight"}:
        short = name.removeprefix(f"{model.base_model_prefix}.")
        model._keys_to_ignore_on_load_unexpected.add(rf"(^|\.){re.escape(short)}$")


def spellings(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """A name as it is, without and with the base model's prefix: classes of one model, and their
    files, differ in it."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def build_skeleton(
    model: PreTrainedModel, config: QuantizedModelConfig
) -> tuple[QuantizedModelConfig, dict[str, PackedLayer], set[str]]:
    """Turns the layers of a plan into empty packed ones, in place, ties and sharing declared.

    Args:
        model: a dense model on the meta device, of any class that has a part of the plan's layers.
        config: that of the checkpoint.

    Returns:
        The config under this class's names; its packed layers by name; the names of those that the
        checkpoint's own class did not have, which join a packed layer they are tied to.

    Raises:
        ValueError: if the plan packs what is no layer here.
    """
    names = _Names(model)
    own = copy(config)
    own.left_dense = {
        name: reason
        for name, reason in names.of(config.left_dense).items()
        if name in names.parameters or names.is_layer(name)
    }
    own.shared_layers = {
        name: names.own(source) for name, source in names.of(config.shared_layers).items()
    }
    stored, anew = _plan_for(names, config.plan)
    own.left_dense |= anew
    own.plan = plan = _close_over_ties(dict(stored), model, names)
    rewriter = TieRewriter(model)
    layers = {name: names.modules[name] for name in plan}
    for name, entry in plan.items():
        pack_skeleton(layers[name], entry_quantizer(entry), entry.get("activation_bits"))
        layers[name]._shape_only = True
    rewriter.rewrite({name: packed_names(layer) for name, layer in layers.items()})
    late = tied_after_loading(model, own.shared_layers)
    declare_shared(model, own.shared_layers, without=late)
    model._keys_to_ignore_on_load_missing.update(f"^{re.escape(name)}$" for name in late)
    return own, layers, plan.keys() - stored.keys()


def dense_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """The shape of each parameter outside of packed layers, before anything was read; of none where
    transformers itself sees to it that what it reads has that shape."""
    if SHAPES_ARE_CHECKED:
        return {}
    return {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if not is_packed(model.get_submodule(name.rpartition(".")[0]))
    }


def require_shapes(model: PreTrainedModel, shapes: dict[str, torch.Size]) -> None:
    """Refuses a model that holds, in place of a parameter, one of another shape from the file.

    Raises:
        RuntimeError: naming it, of the type that transformers raises where it sees to this.
    """
    for name, shape in shapes.items():
        found = model.get_parameter(name).shape
        if found != shape:
            raise RuntimeError(
                f"size mismatch for {name}: {tuple(found)} in the checkpoint, {tuple(shape)} in "
                "this model. Load it as it is and put another layer in its place, or with "
                "ignore_mismatched_sizes=True and transformers from 5.23 on, which starts it anew"
            )


class _Names:
    """Names of modules and parameters as they are in this class of a model: with or without the
    base model's prefix."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.parameters = {
            f"{name}.{key}" if name else key
            for name, module in self.modules.items()
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        self.unsaved = unsaved_tensors(model)

    def own(self, name: str) -> str | None:
        """What a name of the checkpoint is called here; None where this class lacks it."""
        for candidate in spellings(self.model, name):
            if candidate in self.modules or candidate in self.parameters:
                return candidate
        return None

    def of(self, entries: dict) -> dict:
        """Entries under the names they have here, without those that this class lacks."""
        found = ((self.own(name), entry) for name, entry in entries.items())
        return {name: entry for name, entry in found if name is not None}

    def is_layer(self, name: str) -> bool:
        """Whether a module of this name can be packed."""
        module = self.modules.get(name)
        return module is not None and is_layer(module) and f"{name}.weight" not in self.unsaved


def _plan_for(names: _Names, plan: dict[str, dict]) -> tuple[dict[str, dict], dict[str, str]]:
    """The plan under this class's names, without the layers it lacks (another head); and why those
    of another shape are dense."""
    own, anew = {}, {}
    for name, entry in names.of(plan).items():
        if not names.is_layer(name):
            raise ValueError(f"the plan packs {name}, which is no layer that can be packed here")
        rows, columns = matrix_shape(names.modules[name])
        if (rows, columns) != (entry["rows"], entry["columns"]):
            anew[name] = (
                f"it is {rows} x {columns} in this model and {entry['rows']} x {entry['columns']} "
                "in the checkpoint it was loaded from: it started anew"
            )
            logger.warning(f"{name} is left dense: {anew[name]}.")
            continue
        own[name] = {key: value for key, value in entry.items() if key != "tied_to"}
        if (partner := entry.get("tied_to")) is not None:
            own[name]["tied_to"] = names.own(partner) or partner
    return own, anew


def _close_over_ties(
    plan: dict[str, dict], model: PreTrainedModel, names: _Names
) -> dict[str, dict]:
    """Adds the tied partners that the checkpoint's own class did not have (an LM head). What enters
    them was never measured, so it is not rounded."""
    for pair in model.all_tied_weights_keys.items():
        target, source = (name.removesuffix(".weight") for name in pair)
        for here, there in ((source, target), (target, source)):
            if here in plan and there not in plan and names.is_layer(there):
                plan[there] = {**plan[here], "tied_to": here}
                plan[there].pop("activation_bits", None)
    return plan
