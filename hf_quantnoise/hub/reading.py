"""Fast loading: packed layers are read straight from the files of a checkpoint.

transformers handles each tensor separately, which takes several times as long as reading it, and a
packed layer has more tensors than a dense one. Layers whose tensors are in the files under their
own names are read here, and transformers skips them. As with the dense weights that transformers
reads, the tensors are views of the memory-mapped file; memory holds only the pages in use.
"""

from __future__ import annotations

import mmap
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import (
    WeightTransform,
    dtype_plan,
    get_model_conversion_mapping,
    ignored_if_unexpected,
    mark_initialized,
    own_parameters,
    persistent_buffer_names,
    weight_conversions,
)
from ..distributed import is_distributed
from ..files.reading import DTYPES, Header, TensorHeader
from ..modeling import PackedLayer
from .conversions import spellings, without


def read_packed(
    model: PreTrainedModel,
    layers: dict[str, PackedLayer],
    headers: Mapping[str, Header],
    device_map: object,
    kept: Collection[str],
) -> list[str]:
    """Fill the packed layers of a skeleton of which the files hold all tensors, on the CPU.

    The others are left to transformers: layers on other devices or of several processes, layers
    whose names or precision transformers changes (but for the names in ``kept``), and damaged ones,
    which it reports. ``headers`` are those of the files by path. Returns the names of the tensors
    read, as they are in the files.
    """
    if not headers or not _can_read(model, device_map):
        return []
    views = (views_of_file(file, header) for file, header in headers.items())
    source = {key: view for file in views for key, view in file.items()}
    is_renamed = _renaming_test(without(get_model_conversion_mapping(model), kept))
    read: list[str] = []
    for name, layer in layers.items():
        keys = _keys_in_files(model, name, layer, source)
        if keys is None or any(map(is_renamed, keys.values())):
            continue
        if _fill(layer, {parameter: source[key]() for parameter, key in keys.items()}):
            read += keys.values()
    if read:
        ignored_if_unexpected(model).add(pattern_of(read))
    return read


def require_no_renaming(model: PreTrainedModel, read: Iterable[str]) -> None:
    """Raise ValueError if ``key_mapping``, known only after loading, renames a tensor read here."""
    is_renamed = _renaming_test(weight_conversions(model))
    if (key := next(filter(is_renamed, read), None)) is not None:
        raise ValueError(
            f"invalid key_mapping: it renames {key}, which a layer of the plan needs under that "
            "name; load without key_mapping, or rename the tensors in the file"
        )


def _can_read(model: PreTrainedModel, device_map: object) -> bool:
    # With a map of several parts transformers may give the model to accelerate before we see it.
    on_the_cpu = device_map is None or (
        isinstance(device_map, dict) and [*map(str, device_map.values())] == ["cpu"]
    )
    return (
        on_the_cpu
        and sys.platform != "win32"  # a mapped file cannot be overwritten there
        and not dtype_plan(model, model.dtype)
        and not is_distributed()
    )


def views_of_file(file: str, header: Header) -> dict[str, Callable[[], Tensor]]:
    """Return, by name, functions that make the tensors of a safetensors file as views of the file.

    Views are private: writes do not reach the file. (``safetensors`` itself copies the header for
    each tensor.)
    """
    with open(file, "rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: partial(_view, memory, header.nbytes, tensor)
        for name, tensor in header.tensors.items()
        if tensor.dtype in DTYPES
    }


def _view(memory: mmap.mmap, start: int, tensor: TensorHeader) -> Tensor:
    dtype = DTYPES[tensor.dtype]
    if tensor.parameter_count == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    flat = torch.frombuffer(
        memory, dtype=dtype, count=tensor.parameter_count, offset=start + tensor.data_offsets[0]
    )
    return flat.view(tensor.shape)


def _renaming_test(conversions: Iterable[WeightTransform]) -> Callable[[str], bool]:
    """Return a function that tests whether transformers renames a tensor of the files."""
    conversions = list(conversions)
    return lambda key: any(each.rename_source_key(key)[1] for each in conversions)


def _keys_in_files(
    model: PreTrainedModel, name: str, layer: PackedLayer, known: Iterable[str]
) -> dict[str, str] | None:
    """Return parameter -> its name in the files; None if one is missing, or there are buffers."""
    if persistent_buffer_names(layer):
        return None
    parameters = [key for key, parameter in own_parameters(layer).items() if parameter is not None]
    for spelling in spellings(model, name):
        keys = {key: f"{spelling}.{key}" for key in parameters}
        if all(key in known for key in keys.values()):
            return keys
    return None


def _fill(layer: PackedLayer, tensors: dict[str, Tensor]) -> bool:
    """Put tensors into a layer and return True, or return False if their shapes do not match."""
    empty = own_parameters(layer)
    if any(tensor.shape != empty[name].shape for name, tensor in tensors.items()):
        return False
    for name, tensor in tensors.items():
        if is_float := tensor.is_floating_point():
            tensor = tensor.to(empty[name].dtype)
        parameter = nn.Parameter(tensor, is_float)
        mark_initialized(parameter)
        layer.register_parameter(name, parameter)
    layer._loading.is_read = True
    return True


@torch.no_grad()
def release_files(model: PreTrainedModel) -> None:
    """Copy tensors that are views of a memory-mapped file, which would keep all of it in memory."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


@torch.no_grad()
def align(model: PreTrainedModel) -> None:
    """Copy dense matrices that are not aligned to a cache line, as views of a file may be.

    Products take another code path for these, whose last bits differ from the saved model's. Tables
    and packed weights are copied when they are used, so their alignment does not matter.
    """
    for module in model.modules():
        if isinstance(module, PackedLayer | nn.Embedding):
            continue
        for parameter in own_parameters(module).values():
            if parameter is None or parameter.dim() < 2 or parameter.device.type != "cpu":
                continue
            if parameter.data_ptr() % 64:  # bytes of a cache line
                parameter.data = parameter.data.clone()


def pattern_of(names: Iterable[str]) -> str:
    """Return a regex that matches exactly these names.

    Common endings are shared, as the time to compile a regex grows with its length.
    """
    return f"^{_tree([name.split('.') for name in names])}$"


def _tree(paths: Iterable[list[str]]) -> str:
    rests = defaultdict(list)
    for part, *rest in paths:
        rests[part].append(rest)
    parts_by_ending = defaultdict(list)
    for part, endings in rests.items():
        longer = [rest for rest in endings if rest]
        ending = rf"\.{_tree(longer)}" if longer else ""
        if longer and [] in endings:
            ending = f"(?:{ending})?"
        parts_by_ending[ending].append(re.escape(part))
    branches = (f"(?:{'|'.join(parts)}){end}" for end, parts in parts_by_ending.items())
    return f"(?:{'|'.join(branches)})"
