"""The skeleton that a checkpoint is loaded into: packed layers of the plan on the meta device."""

from __future__ import annotations

import re
from collections.abc import Collection, Container
from copy import copy
from functools import cache

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import matrix_shape
from ..compat import ignored_if_missing, ignored_if_unexpected, ignored_on_save, own_parameters
from ..configuration import QuantizedModelConfig, settings_of
from ..modeling import PackedLayer
from ..modeling.convert import pack_skeleton
from ..modeling.packed import INDICES
from ..modeling.structural_changes import declare_shared, tied_after_loading
from ..modeling.ties import renamed_ties
from ..quantizers import Quantizer, quantizer_from_dict
from ..sharing import difference
from ..structure import is_layer
from .conversions import renamed_layer, renamings_of, spellings
from .replaced_ties import untie_replaced

logger = logging.get_logger(__name__)

# Earlier releases load tensors of any shape into a quantized model.
SHAPES_ARE_CHECKED = Version(transformers.__version__) >= Version("5.23.0")


def sentinel_names(config: QuantizedModelConfig, model: nn.Module) -> list[str]:
    """Return the names of the one-byte tensors that a file has in place of dense weights.

    Each part of the model (a child of the base model, or a head) has one, named after its first
    packed weight in the order of names: some classes lack parts, ``GPT2Model`` the head.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, str] = {}
    for name in sorted(config.plan):
        if "tied_to" not in config.plan[name]:
            part = name.removeprefix(prefix).partition(".")[0]
            names.setdefault(part, f"{name}.weight")
    return list(names.values())


def allow_sentinels(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Allow the sentinels in the file, with and without the base model's prefix."""
    # Files of the first releases have a single one, of any part.
    for name in {*sentinel_names(config, model), f"{min(config.plan)}.weight"}:
        short = name.removeprefix(f"{model.base_model_prefix}.")
        ignored_if_unexpected(model).add(rf"(^|\.){re.escape(short)}$")


def quantizer_of(entry: dict) -> Quantizer:
    """Return the quantizer of an entry that has been checked."""
    settings = settings_of(entry).items()
    return _quantizer(tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in settings))


@cache
def _quantizer(settings: tuple) -> Quantizer:
    return quantizer_from_dict(dict(settings))


def build_skeleton(
    names: Names, config: QuantizedModelConfig, stored: Collection[str]
) -> tuple[QuantizedModelConfig, dict[str, PackedLayer], set[str]]:
    """Turn the layers of a plan into empty packed ones, in place, with ties and sharing declared.

    The model is on the meta device, of any class that has a part of the plan's layers. ``stored``
    names those whose codes are in the files (``file_check.py``). Returns the config with the names
    of this class; its packed layers by name; the names of those that the class of the checkpoint
    lacks, which are tied to a packed layer.
    """
    model = names.model
    local = copy(config)
    local.left_dense = {
        name: reason
        for name, reason in names.translate(config.left_dense).items()
        if name in names.parameters or names.is_layer(name)
    }
    local.shared_layers = names.translate_shared(config.shared_layers)
    kept, reshaped = _translate_plan(names, config.plan, stored)
    local.plan = plan = _close_over_ties(kept, names, local.left_dense)
    untie_replaced(model, local)
    local.left_dense |= reshaped
    layers = {name: names.modules[name] for name in plan}
    with renamed_ties(model, plan):
        for name, entry in plan.items():
            pack_skeleton(
                layers[name], quantizer_of(entry), entry.get("activation_bits"), loading=True
            )
    untied = tied_after_loading(model, local.shared_layers)
    declare_shared(model, local.shared_layers, without=untied)
    ignored_if_missing(model).update(f"^{re.escape(name)}$" for name in untied)
    _require_equal_settings(model, plan)
    return local, layers, plan.keys() - kept.keys()


def shapes_before_loading(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the shapes of all parameters; none if transformers checks them itself."""
    if SHAPES_ARE_CHECKED:
        return {}
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def require_shapes(model: PreTrainedModel, shapes: dict[str, torch.Size]) -> None:
    """Raise RuntimeError (as newer transformers) if a parameter was loaded with another shape."""
    for name, shape in shapes.items():
        if (found := model.get_parameter(name).shape) != shape:
            raise RuntimeError(
                f"size mismatch for {name}: {tuple(found)} in the checkpoint, {tuple(shape)} in "
                "the model; load the model unchanged and replace the layer, or pass "
                "ignore_mismatched_sizes=True with transformers 5.23 or newer, which initialises it"
            )


class Names:
    """Names in this class of a model, of layers that another class may have saved."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.parameters = {
            f"{name}.{key}" if name else key
            for name, module in self.modules.items()
            for key, parameter in own_parameters(module).items()
            if parameter is not None
        }
        self.unsaved = ignored_on_save(model)
        self.renamings = renamings_of(model)
        architectures = model.config.architectures or ()
        self.is_of_class_that_saved = type(model).__name__ in architectures

    def find(self, name: str) -> str | None:
        """Return the local name for a name of the checkpoint, or None if this class lacks it."""
        for known in (name, renamed_layer(name, self.renamings)):
            for candidate in spellings(self.model, known):
                if candidate in self.modules or candidate in self.parameters:
                    return candidate
        return None

    def translate(self, entries: dict) -> dict:
        """Return entries under their local names, without the names that this class lacks."""
        found = ((self.find(name), entry) for name, entry in entries.items())
        return {name: entry for name, entry in found if name is not None}

    def translate_shared(self, shared_layers: dict[str, str]) -> dict[str, str]:
        """Return shared layers under their local names; ValueError if two cannot share weights."""
        local = {}
        for name, source in self.translate(shared_layers).items():
            found = self.find(source)
            if found is None or found == name or source in shared_layers:
                raise ValueError(
                    f"invalid shared_layers[{name!r}]={source!r} in quantization_config: expected "
                    "another layer, which has its own weights; restore config.json"
                )
            if not self.modules.keys() >= {name, found}:
                reason = "kind (a parameter and a layer)"
            else:
                reason = difference(self.modules[name], self.modules[found])
            if reason:
                raise ValueError(
                    f"invalid shared_layers[{name!r}]={source!r} in quantization_config: expected "
                    f"two similar layers, they differ in {reason}; restore config.json"
                )
            local[name] = found
        return local

    def is_layer(self, name: str) -> bool:
        """Return whether there is a layer of this name that can be packed."""
        module = self.modules.get(name)
        return module is not None and is_layer(module) and f"{name}.weight" not in self.unsaved


def _translate_plan(
    names: Names, plan: dict[str, dict], stored: Collection[str]
) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the plan with local names, and why layers of another shape (a new head) stay dense."""
    local: dict[str, dict] = {}
    reshaped: dict[str, str] = {}
    for original, entry in plan.items():
        if (name := names.find(original)) is None:
            continue
        if not names.is_layer(name):
            if name in names.modules and not names.is_of_class_that_saved:
                continue  # another head, of several layers under this name
            raise ValueError(
                f"invalid plan in quantization_config: {name} is not a layer that can be packed in "
                f"{type(names.model).__name__}"
            )
        if name in local or name in reshaped:
            raise ValueError(
                f"invalid plan in quantization_config: it has two entries for {name}, one of them "
                f"as {original}; restore config.json"
            )
        rows, columns = matrix_shape(names.modules[name])
        if (rows, columns) != (entry["rows"], entry["columns"]):
            reshaped[name] = (
                f"its shape is {rows} x {columns} in this model and {entry['rows']} x "
                f"{entry['columns']} in the checkpoint, so it was initialised from scratch"
            )
            logger.warning(f"{name} stays dense: {reshaped[name]}.")
            if original in stored:
                _add_placeholder(names.modules[name])
            continue
        local[name] = {key: value for key, value in entry.items() if key != "tied_to"}
        if (partner := entry.get("tied_to")) is not None:
            local[name]["tied_to"] = names.find(partner) or partner
    return local, reshaped


def _add_placeholder(layer: nn.Module) -> None:
    """Add a parameter to a dense layer, of a shape that no codes in the files have.

    transformers then raises, unless ``ignore_mismatched_sizes`` is passed, as it does for dense
    weights of another shape.
    """
    placeholder = torch.empty(*matrix_shape(layer), 1, dtype=torch.uint8, device="meta")
    layer.register_parameter(INDICES, nn.Parameter(placeholder, False))


def remove_placeholders(model: nn.Module) -> None:
    """Remove what :func:`build_skeleton` has added to dense layers, after loading."""
    for module in model.modules():
        if not isinstance(module, PackedLayer):
            own_parameters(module).pop(INDICES, None)


def _require_equal_settings(model: PreTrainedModel, plan: dict[str, dict]) -> None:
    """Raise ValueError if layers of the plan that hold one weight are stored differently."""
    for names in model.all_tied_weights_keys.items():
        layer, source = (name.removesuffix(f".{INDICES}") for name in names)
        if layer not in plan or source not in plan:
            continue
        if quantizer_of(plan[layer]) != quantizer_of(plan[source]):
            raise ValueError(
                f"invalid plan in quantization_config: {layer} and {source} hold one weight and "
                f"have different settings, {settings_of(plan[layer])} and "
                f"{settings_of(plan[source])}; restore config.json"
            )


def _close_over_ties(plan: dict[str, dict], names: Names, dense: Container[str]) -> dict[str, dict]:
    """Add tied partners that the class of the checkpoint lacks (an LM head).

    Their inputs were never measured, so they are not rounded. ``dense`` has the skipped layers,
    which are in the files.
    """
    plan = dict(plan)
    for pair in names.model.all_tied_weights_keys.items():
        target, source = (name.removesuffix(".weight") for name in pair)
        for known, partner in ((source, target), (target, source)):
            if partner in plan or partner in dense:
                continue
            if known in plan and names.is_layer(partner):
                plan[partner] = {**plan[known], "tied_to": known}
                plan[partner].pop("activation_bits", None)
    return plan
