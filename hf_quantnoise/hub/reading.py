"""Packed layers read straight off the files of a checkpoint.

Transformers handles each tensor of a checkpoint by itself, at several times the cost of reading it,
and a packed layer has more tensors than a dense one. What a layer finds in the files under its own
names is read here, and transformers passes it over. Like the dense weights that transformers reads
it stays a window on the file, of which only what is used is in memory.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform

from ..distributed import is_distributed
from ..modeling import PackedLayer
from .skeleton import spellings

# Names of dtypes in the header of a safetensors file.
FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip
DTYPES = {**FLOATS, "U8": torch.uint8}


def read_packed(
    model: PreTrainedModel,
    layers: dict[str, PackedLayer],
    files: Sequence[str] | None,
    device_map: object,
) -> list[str]:
    """Fills the empty packed layers that the files hold whole, in this process and for its CPU.

    The others are left to transformers: those on other devices or of several processes, those whose
    names or precision it changes while it reads, and damaged ones, whose errors name what is wrong.

    Args:
        model: the skeleton, on the meta device.
        layers: its packed layers, by name.
        files: those of the checkpoint.
        device_map: as ``from_pretrained`` got it.

    Returns:
        The names in the files of what was read.
    """
    if not _is_read_here(model, files, device_map):
        return []
    source = {key: window for file in files for key, window in windows_on(file).items()}
    changed = _is_changed(get_model_conversion_mapping(model))
    read: list[str] = []
    for name, layer in layers.items():
        keys = _keys_in_files(model, name, layer, source)
        if keys is None or any(map(changed, keys.values())):
            continue
        if _fill(layer, {own: source[key]() for own, key in keys.items()}):
            read += keys.values()
    if read:
        model._keys_to_ignore_on_load_unexpected.add(pattern_of(read))
    return read


def require_own_names(model: PreTrainedModel, read: Iterable[str]) -> None:
    """Refuses a ``key_mapping`` of ``from_pretrained``, which is seen after loading alone, that
    gives tensors other names although they lay in the files under those of the model's layers.

    Raises:
        ValueError: naming one.
    """
    changed = _is_changed(model._weight_conversions or ())
    if (key := next(filter(changed, read), None)) is not None:
        raise ValueError(
            f"key_mapping renames {key}, the very name that a layer of the plan has here; load "
            "without key_mapping, or give the tensors their new names in the file"
        )


def _is_read_here(model: PreTrainedModel, files: Sequence[str] | None, device_map: object) -> bool:
    # With a map of parts transformers may hand the model to accelerate before we see it again.
    on_the_cpu = device_map is None or (
        isinstance(device_map, dict) and [*map(str, device_map.values())] == ["cpu"]
    )
    return (
        on_the_cpu
        and sys.platform != "win32"  # which lets no mapped file be written anew
        and files is not None
        and all(str(file).endswith(".safetensors") for file in files)
        and not model._get_dtype_plan(model.dtype)
        and not is_distributed()
    )


def windows_on(file: str) -> dict[str, Callable[[], Tensor]]:
    """Name of each tensor of a safetensors file -> what makes it a window on the file: private, so
    that no write to it reaches the file. (``safetensors`` copies the header for each tensor.)
    Nothing of a damaged file, which transformers tells of."""
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        if not 8 < start < size:
            return {}
        header = opened.read(start - 8)
        whole = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        tensors = json.loads(header)
    except ValueError:
        return {}
    tensors.pop("__metadata__", None)
    if start + max((own["data_offsets"][1] for own in tensors.values()), default=0) > size:
        return {}
    return {
        name: partial(_window, whole, start, own)
        for name, own in tensors.items()
        if own["dtype"] in DTYPES
    }


def _window(whole: mmap.mmap, start: int, tensor: dict) -> Tensor:
    flat = torch.frombuffer(
        whole,
        dtype=DTYPES[tensor["dtype"]],
        count=math.prod(tensor["shape"]),
        offset=start + tensor["data_offsets"][0],
    )
    return flat.view(tensor["shape"])


def _is_changed(conversions: Iterable[WeightTransform]) -> Callable[[str], bool]:
    """Says of a name in the files whether transformers changes it."""
    tests = [
        own.compiled_sources.search
        if own.scope_prefix is None
        else lambda key, own=own: own.rename_source_key(key)[1]
        for own in conversions
    ]
    return lambda key: any(test(key) for test in tests)


def _keys_in_files(
    model: PreTrainedModel, name: str, layer: PackedLayer, known: Iterable[str]
) -> dict[str, str] | None:
    """Parameter of a layer -> its name in the files; None where they are not all there, or the
    layer has buffers there as well."""
    if layer._buffers.keys() - layer._non_persistent_buffers_set:
        return None
    parameters = [key for key, parameter in layer._parameters.items() if parameter is not None]
    for start in spellings(model, name):
        keys = {key: f"{start}.{key}" for key in parameters}
        if all(key in known for key in keys.values()):
            return keys
    return None


def _fill(layer: PackedLayer, tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors fit, and so were put into the layer."""
    empty = layer._parameters
    if any(tensor.shape != empty[name].shape for name, tensor in tensors.items()):
        return False
    for name, tensor in tensors.items():
        trained = tensor.is_floating_point() and empty[name].requires_grad
        if tensor.is_floating_point():
            tensor = tensor.to(empty[name].dtype)
        parameter = nn.Parameter(tensor, trained)
        parameter._is_hf_initialized = True
        layer.register_parameter(name, parameter)
    layer._is_read = True
    return True


def pattern_of(names: Iterable[str]) -> str:
    """A regex that matches these names and no others; parts of them that go on alike share what
    follows, as it takes its time to compile for its length."""
    return f"^{_tree([name.split('.') for name in names])}$"


def _tree(paths: Iterable[list[str]]) -> str:
    rests = defaultdict(list)
    for part, *rest in paths:
        rests[part].append(rest)
    alike = defaultdict(list)
    for part, own in rests.items():
        further = [rest for rest in own if rest]
        follows = rf"\.{_tree(further)}" if further else ""
        if further and [] in own:
            follows = f"(?:{follows})?"
        alike[follows].append(re.escape(part))
    return f"(?:{'|'.join(_any_of(parts) + follows for follows, parts in alike.items())})"


def _any_of(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"
