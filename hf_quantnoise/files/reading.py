"""Reading the files of a checkpoint: JSON, the index of shards, headers of safetensors files.

A damaged file, or one that was made to do harm, raises a ``ValueError`` that names the file.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..text import printable, shown

# Limits far above any model's.
MAX_NAME_LENGTH = 1_000
MAX_ENTRIES = 200_000
MAX_HEADER_BYTES = 100_000_000  # as in safetensors

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# Dtypes in the header of a safetensors file, in the order in which a file stores its tensors. The
# size of tensors of other dtypes (4 bits, float8_e8m0) is not checked.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F32": torch.float32, "U32": torch.uint32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = {name: DTYPES[name] for name in ("F64", "F32", "BF16", "F16")}


def damaged(place: object, reason: object) -> ValueError:
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

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.data_offsets[1] - self.data_offsets[0]

    @classmethod
    def of(cls, place: object, name: str, dtype: Any, shape: Any, offsets: Any) -> TensorHeader:
        """Return the description of a tensor; ``place`` names the file in errors."""
        tensor = f"the tensor {name[:MAX_NAME_LENGTH]!r} has"
        if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise damaged(place, f"{tensor} a name that is too long or cannot be printed")
        if not isinstance(dtype, str) or not re.fullmatch(r"\w{1,20}", dtype, re.ASCII):
            raise damaged(place, f"{tensor} no valid dtype")
        if not _are_sizes(shape):
            raise damaged(place, f"{tensor} no valid shape")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise damaged(place, f"{tensor} no valid data_offsets")
        found = cls(dtype, tuple(shape), tuple(offsets))
        nbytes = DTYPES[dtype].itemsize * found.parameter_count if dtype in DTYPES else found.nbytes
        if nbytes != found.nbytes:
            raise damaged(place, f"{tensor} another size than dtype and shape give")
        return found


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its length in bytes, metadata, and tensors by name."""

    nbytes: int
    metadata: Mapping[str, str]
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
        raise damaged(place, "it is nested too deeply") from None
    except ValueError as error:  # JSON, or its encoding
        raise damaged(place, error) from None
    if not isinstance(values, dict):
        raise damaged(place, "its content is not a JSON object")
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
        raise damaged(file, "weight_map does not map tensor names to files")
    if not isinstance(index.get("metadata"), dict):  # which transformers requires
        raise damaged(file, "metadata is not a JSON object")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise damaged(file, f"weight_map has {shown(shard)} in place of a safetensors file")
        if os.path.basename(shard) != shard or "\\" in shard or not shard.isprintable():
            raise damaged(file, f"weight_map has {shown(shard)}, which is not in its folder")
    return shards


def read_header(file: str | os.PathLike) -> Header:
    """Return the header of a safetensors file.

    Raises:
        ValueError: naming the file, if it is damaged.
        OSError: if it is missing.
    """
    if (size := os.path.getsize(file)) < 8:  # also of a pipe, which would block
        raise damaged(file, f"it has {size:,} bytes")
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise damaged(file, f"it has {size:,} bytes and its header would have {length:,}")
        values = _parse(file, opened.read(length))
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(file, "its metadata does not map names to strings")
    if len(values) > MAX_ENTRIES:
        raise damaged(file, f"its header has more than {MAX_ENTRIES:,} tensors")
    tensors = {}
    for name, entry in values.items():
        fields = entry if isinstance(entry, dict) else {}
        described = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        tensors[name] = TensorHeader.of(file, name, *described)
    _require_contiguous(file, tensors, size - 8 - length)
    return Header(8 + length, metadata, tensors)


def _require_contiguous(file: object, tensors: Mapping[str, TensorHeader], nbytes: int) -> None:
    """Raise unless the tensors fill the bytes after the header, without gaps or overlaps."""
    end = 0
    for begin, following in sorted(tensor.data_offsets for tensor in tensors.values()):
        if begin != end:
            raise damaged(file, f"its header has a gap or an overlap at byte {end:,}")
        end = following
    if end != nbytes:
        raise damaged(file, f"it has {nbytes:,} bytes of data and its header describes {end:,}")


def headers_of(files: Iterable[str] | None) -> dict[str, Header]:
    """Return the headers of safetensors files by path.

    Raises ValueError if a file is damaged or of another format.
    """
    headers = {}
    for file in map(str, files or ()):
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"invalid file {file!r}: packed models are stored as safetensors; save the model "
                "again with save_pretrained"
            )
        headers[file] = read_header(file)
    return headers


def tensors_in(headers: Mapping[str, Header]) -> dict[str, TensorHeader]:
    """Return the tensors of some files by name; ValueError if one is in two of them."""
    found: dict[str, TensorHeader] = {}
    for file, header in headers.items():
        if repeated := found.keys() & header.tensors.keys():
            raise ValueError(
                f"invalid file {file!r}: {min(repeated)} is in another file as well; download or "
                "save the model again"
            )
        found |= header.tensors
    return found


def headers_in(folder: str) -> dict[str, Header]:
    """Return the header of each safetensors file of the model in a folder, by file name.

    If no file has the name of a model file, these are all safetensors files (those of an adapter).
    """
    if os.path.isfile(os.path.join(folder, WEIGHTS)):
        names = [WEIGHTS]
    elif os.path.isfile(index := os.path.join(folder, INDEX)):
        shards = read_index(index)
        names = sorted({*shards.values()})
        headers = {name: read_header(os.path.join(folder, name)) for name in names}
        tensors_in(headers)
        stored = {name: shard for shard, header in headers.items() for name in header.tensors}
        if stored != shards:
            raise damaged(index, "weight_map does not match the tensors in its shards")
        return headers
    else:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    return {name: read_header(os.path.join(folder, name)) for name in names}
