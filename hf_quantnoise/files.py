"""Reading the files of a checkpoint: JSON, the index of shards, headers of safetensors files.

A damaged file, or one that was made to do harm, raises a ``ValueError`` that names the file.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .text import printable

# Limits far above any model's.
MAX_NAME_LENGTH = 1_000
MAX_ENTRIES = 200_000
MAX_HEADER_BYTES = 100_000_000  # as in safetensors

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# Bytes per value of dtypes in a safetensors header. Others (of 4 bits) are not checked.
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


def _damaged(place: object, reason: object) -> ValueError:
    """Return the error of a damaged file, to be raised."""
    return ValueError(
        f"{printable(place)} is truncated or corrupted: {printable(reason)}; download or save it "
        "again"
    )


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as described in the header of its file; ``data_offsets`` begin after the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def parameter_count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, place: object, name: str, dtype: Any, shape: Any, offsets: Any) -> TensorHeader:
        """Return the description of a tensor; ``place`` names the file in errors."""
        tensor = f"the tensor {name[:MAX_NAME_LENGTH]!r} has"
        if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise _damaged(place, f"{tensor} a name that is too long or cannot be printed")
        if not isinstance(dtype, str) or not re.fullmatch(r"\w{1,20}", dtype, re.ASCII):
            raise _damaged(place, f"{tensor} no valid dtype")
        if not _are_sizes(shape):
            raise _damaged(place, f"{tensor} no valid shape")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise _damaged(place, f"{tensor} no valid data_offsets")
        found = cls(dtype, tuple(shape), tuple(offsets))
        size = _ITEM_BYTES.get(dtype)
        if size is not None and size * found.parameter_count != offsets[1] - offsets[0]:
            raise _damaged(place, f"{tensor} another size than dtype and shape give")
        return found


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its length in bytes, and its tensors by name."""

    nbytes: int
    tensors: Mapping[str, TensorHeader]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _parse(place: object, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content, object_pairs_hook=_unique)
    except RecursionError:
        raise _damaged(place, "it is nested too deeply") from None
    except ValueError as error:  # JSON, or its encoding
        raise _damaged(place, error) from None
    if not isinstance(values, dict):
        raise _damaged(place, "its content is not a JSON object")
    return values


def read_json(file: str | os.PathLike) -> dict[str, Any]:
    """Return the content of a JSON file, which must be an object.

    Raises:
        ValueError: naming the file, if it is damaged.
        OSError: if it is missing.
    """
    with open(file, "rb") as opened:
        return _parse(file, opened.read())


def read_index(file: str | os.PathLike) -> dict[str, str]:
    """Return tensor name -> name of its shard, of the index of a sharded checkpoint.

    Raises:
        ValueError: naming the file, if it is damaged or names a file outside of its folder.
        OSError: if it is missing.
    """
    index = read_json(file)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards or len(shards) > MAX_ENTRIES:
        raise _damaged(file, "weight_map does not map tensor names to files")
    if not isinstance(index.get("metadata"), dict):  # which transformers requires
        raise _damaged(file, "metadata is not a JSON object")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise _damaged(file, f"weight_map has {shard!r:.200} in place of a safetensors file")
        if os.path.basename(shard) != shard or "\\" in shard or not shard.isprintable():
            raise _damaged(file, f"weight_map has {shard!r:.200}, which is not in its folder")
    return shards


def read_header(file: str | os.PathLike) -> Header:
    """Return the header of a safetensors file.

    Raises:
        ValueError: naming the file, if it is damaged.
        OSError: if it is missing.
    """
    if (size := os.path.getsize(file)) < 8:  # also of a pipe, which would block
        raise _damaged(file, f"it has {size:,} bytes")
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(file, f"it has {size:,} bytes and its header would have {length:,}")
        values = _parse(file, opened.read(length))
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "its metadata does not map texts to texts")
    if len(values) > MAX_ENTRIES:
        raise _damaged(file, f"its header has more than {MAX_ENTRIES:,} tensors")
    tensors = {}
    for name, entry in values.items():
        fields = entry if isinstance(entry, dict) else {}
        described = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        tensors[name] = TensorHeader.of(file, name, *described)
    _require_contiguous(file, tensors, size - 8 - length)
    return Header(8 + length, tensors)


def _require_contiguous(file: object, tensors: Mapping[str, TensorHeader], nbytes: int) -> None:
    """Raise unless the tensors fill the bytes after the header, without gaps or overlaps."""
    end = 0
    for begin, following in sorted(tensor.data_offsets for tensor in tensors.values()):
        if begin != end:
            raise _damaged(file, f"its header has a gap or an overlap at byte {end:,}")
        end = following
    if end != nbytes:
        raise _damaged(file, f"it has {nbytes:,} bytes of data and its header describes {end:,}")


def headers_in(folder: str) -> dict[str, Header]:
    """Return the header of each safetensors file of the model in a folder, by file name.

    If no file has the name of a model file, these are all safetensors files (those of an adapter).
    """
    if os.path.isfile(os.path.join(folder, WEIGHTS)):
        names = [WEIGHTS]
    elif os.path.isfile(index := os.path.join(folder, INDEX)):
        shards = read_index(index)
        headers = {name: read_header(os.path.join(folder, name)) for name in {*shards.values()}}
        stored = {name: shard for shard, header in headers.items() for name in header.tensors}
        if stored != shards or len(stored) < sum(len(each.tensors) for each in headers.values()):
            raise _damaged(index, "weight_map does not match the tensors in its shards")
        return headers
    else:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    return {name: read_header(os.path.join(folder, name)) for name in names}
