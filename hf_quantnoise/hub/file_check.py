"""Checks that the files of a checkpoint and its plan describe the same packed tensors.

Without them a layer whose entry is missing would be loaded dense, with random weights, although its
codes are in the file. Only the headers of the files are read.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compat import (
    get_model_conversion_mapping,
    load_offloaded_parameter,
    own_buffers,
    own_parameters,
)
from ..configuration import QUANTIZERS, QuantizedModelConfig, settings_of
from ..files.reading import FLOATS, TensorHeader
from ..layer_types import known_layer_type
from ..modeling.convert import packed_layers, packed_spec
from ..modeling.packed import INDICES, INPUT_NAMES, PREFIX
from ..modeling.value_check import invalid_values
from ..text import printable
from .conversions import has_names_of_plan, not_stored, spellings
from .skeleton import Names, quantizer_of

_RESTORE = "restore config.json and the files from one save, or save the model again"


def check_files(
    names: Names, config: QuantizedModelConfig, stored: Mapping[str, TensorHeader]
) -> set[str]:
    """Raise ValueError unless each packed tensor belongs to an entry of the plan, and vice versa.

    A class may lack layers of the checkpoint (the head); those are checked if it is the class that
    saved the checkpoint. Returns the names in the plan of the layers whose codes are stored.
    """
    model, plan = names.model, config.plan
    if not stored:  # the tensors are in a state dict that was passed to from_pretrained
        return {name for name, entry in plan.items() if "tied_to" not in entry}
    by_layer = {names.find(name) or name: name for name in plan}
    lacks_nothing = type(model).__name__ in (model.config.architectures or ())
    packed = _packed_tensor_names()
    candidates = _layer_names(config, model, stored)
    found: set[str] = set()
    require_kind = _kind_check(model)
    for key, tensor in stored.items():
        require_kind(key, tensor)
        leaf = key.rpartition(".")[2]
        if leaf != "weight" and leaf not in packed:
            continue
        layers = candidates(key)
        local = next((name for name in map(names.find, layers) if name is not None), None)
        name = by_layer.get(local) if local is not None else _entry_of(model, layers, plan)
        if name is not None:
            _check_tensor(names, name, plan[name], leaf, key, tensor)
            if leaf == INDICES:
                found.add(name)
        elif leaf == "weight" or _is_own(names, local, leaf):
            continue
        elif lacks_nothing or local is not None:
            raise ValueError(
                f"invalid plan in quantization_config: it has no entry for {layers[-1]}, whose "
                f"{leaf} is in the files; {_RESTORE} (key_mapping cannot rename packed tensors)"
            )
    for name in not_stored(config, found):
        if lacks_nothing or names.find(name) is not None:
            raise ValueError(
                f"the checkpoint lacks {printable(name)}.{INDICES}, which is in its plan: the "
                "entry was renamed, or a file is missing or belongs to another model; download or "
                "save the model again"
            )
    return found


def _kind_check(model: PreTrainedModel) -> Callable[[str, TensorHeader], None]:
    """Return a check that floats of the model are stored as floats, and integers as integers.

    transformers converts one to the other.
    """
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    is_float = {name: tensor.is_floating_point() for name, tensor in tensors}

    def check(key: str, tensor: TensorHeader) -> None:
        stored_as_float = tensor.dtype in FLOATS or tensor.dtype.startswith("F8")
        for name in spellings(model, key):
            if is_float.get(name, stored_as_float) != stored_as_float and not _is_sentinel(tensor):
                expected = "a float" if is_float[name] else "an integer"
                raise ValueError(
                    f"invalid dtype {tensor.dtype} of {key}: expected {expected}; {_RESTORE}"
                )

    return check


def _is_sentinel(tensor: TensorHeader) -> bool:
    return (tensor.dtype, tensor.shape) == ("U8", (1,))


def _packed_tensor_names() -> set[str]:
    """Return the names that tensors of packed layers can have."""
    state = {PREFIX + key for scheme in QUANTIZERS for key in QUANTIZERS[scheme].state_names}
    return {INDICES, *INPUT_NAMES, *state}


def _is_own(names: Names, layer: str | None, tensor: str) -> bool:
    """Return whether a layer of the model has a tensor of this name that is not a packed one."""
    if layer is None:
        return False
    module = names.modules[layer]
    return tensor in own_parameters(module) or tensor in own_buffers(module)


def _layer_names(
    config: QuantizedModelConfig, model: PreTrainedModel, stored: Container[str]
) -> Callable[[str], tuple[str, ...]]:
    """Return a function from a tensor in the files to the names that its layer may have.

    These are the name that transformers gives to it and, if the model lacks that, its own. Files
    that have all codes under the names of the plan (``conversions.py``) are not renamed.
    """
    if has_names_of_plan(config, stored):
        return lambda key: (key.rpartition(".")[0],)
    conversions = get_model_conversion_mapping(model)

    def names(key: str) -> tuple[str, ...]:
        renamed = key
        for conversion in conversions:
            renamed, _ = conversion.rename_source_key(renamed)
        return renamed.rpartition(".")[0], key.rpartition(".")[0]

    return names


def _entry_of(model: PreTrainedModel, layers: Iterable[str], plan: Mapping) -> str | None:
    """Return the name in the plan of a layer that this class lacks."""
    known = (name for layer in layers for name in spellings(model, layer))
    return next((name for name in known if name in plan), None)


def _check_tensor(
    names: Names, name: str, entry: dict[str, Any], leaf: str, key: str, tensor: TensorHeader
) -> None:
    """Raise ValueError if a stored tensor is not the one that the entry of its layer describes."""
    settings = settings_of(entry)
    field = f"invalid plan[{name!r}]"
    if leaf == "weight":
        if not _is_sentinel(tensor):
            raise ValueError(f"{field}: the files hold {key}, a dense weight, too; {_RESTORE}")
        return
    spec = packed_spec(quantizer_of(entry), entry["rows"], entry["columns"])
    if leaf in INPUT_NAMES and _rounds_inputs(names, name, entry):
        spec = {leaf: ((), torch.float32)}
    if leaf not in spec:
        raise ValueError(
            f"{field}: the files hold {key}, which layers with {_text(settings)}, activation_bits="
            f"{entry.get('activation_bits')!r} do not have; {_RESTORE}"
        )
    shape, dtype = spec[leaf]
    if tensor.shape != shape:
        raise ValueError(
            f"{field}: with rows={entry['rows']}, columns={entry['columns']}, {_text(settings)}, "
            f"{leaf} has shape {shape}, but {tensor.shape} in the files; {_RESTORE}"
        )
    allowed = FLOATS if dtype.is_floating_point else ["U8"]
    if tensor.dtype not in allowed:
        raise ValueError(
            f"invalid dtype {tensor.dtype} of {key}: expected {' or '.join(allowed)} with "
            f"{_text(settings)}; {_RESTORE}"
        )


def _rounds_inputs(names: Names, name: str, entry: dict[str, Any]) -> bool:
    if entry.get("activation_bits") is None:
        return False
    local = names.find(name)
    return local is None or not known_layer_type(names.modules[local]).is_table


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def require_valid_values(model: PreTrainedModel) -> None:
    """Raise ValueError if a packed layer of a model that was just loaded has invalid values.

    Centroids of 8 bits are still codes. Tensors that are offloaded are read for it, one by one.
    """
    seen: set[int] = set()  # tensors of tied layers
    for name, layer in packed_layers(model):
        for key, tensor in layer.tensors().items():
            if id(tensor) in seen or not (key.startswith(PREFIX) or key in INPUT_NAMES):
                continue
            seen.add(id(tensor))
            value = load_offloaded_parameter(model, f"{name}.{key}") if tensor.is_meta else tensor
            reason = invalid_values(layer.quantizer, layer.n_codes, key.removeprefix(PREFIX), value)
            if reason is not None:
                raise ValueError(
                    f"invalid {name}.{key}: {reason}; the file is damaged: download or save the "
                    "model again, or load it with AutoQuantizedModel and check=False"
                )
