"""What safetensors files say of themselves: names, types and sizes, without the numbers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    get_local_safetensors_metadata,
    hf_hub_url,
    parse_local_safetensors_file_metadata,
)
from huggingface_hub.errors import NotASafetensorsRepoError

from ..hub.reading import FLOATS

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Headers:
    """What the safetensors files of a model say of themselves.

    Attributes:
        tensors: name -> ``huggingface_hub``'s ``TensorInfo``: dtype, shape, offsets.
        file_bytes: size of the files, headers included.
    """

    tensors: dict
    file_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """Size of the tensors alone."""
        return sum(map(bytes_of, self.tensors.values()))

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating-point type that most numbers have; None where there is none."""
        counts = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in FLOATS:
                counts[FLOATS[tensor.dtype]] += tensor.parameter_count
        return counts.most_common(1)[0][0] if counts else None


def bytes_of(tensor) -> int:
    """Bytes of a tensor in its file."""
    begin, end = tensor.data_offsets
    return end - begin


def local_headers(folder: str) -> Headers | None:
    """Those of the model in a folder; where no file is named as a model's, of every safetensors
    file in it (an adapter's). None where there is none.

    Raises:
        ValueError: naming a file that is cut short.
    """
    try:
        files = get_local_safetensors_metadata(folder).files_metadata
    except NotASafetensorsRepoError:
        files = {
            name: parse_local_safetensors_file_metadata(os.path.join(folder, name))
            for name in _safetensors(os.listdir(folder))
        }
    paths = {name: os.path.join(folder, name) for name in files}
    for name, path in paths.items():
        _require_whole(path, files[name], os.path.getsize(path), _header_bytes(path))
    return _headers(files, sum(map(os.path.getsize, paths.values())))


def hub_headers(repo: str, revision: str | None) -> Headers | None:
    """The same of a repository, of which no more than the beginnings of the files are read.

    Raises:
        ValueError: naming a file that is cut short.
    """
    api = HfApi()
    try:
        files = api.get_safetensors_metadata(repo, revision=revision).files_metadata
    except NotASafetensorsRepoError:
        files = {
            name: api.parse_safetensors_file_metadata(repo, name, revision=revision)
            for name in _safetensors(api.list_repo_files(repo, revision=revision))
        }
    total = 0
    for name, file in files.items():
        url = hf_hub_url(repo, name, revision=revision)
        size = get_hf_file_metadata(url).size or 0
        _require_whole(url, file, size, header_bytes=8)  # its length at least; more is not told
        total += size
    return _headers(files, total)


def _safetensors(names: list[str]) -> list[str]:
    """Those that are safetensors files of the folder itself."""
    return sorted(name for name in names if name.endswith(SUFFIX) and "/" not in name)


def _header_bytes(path: str) -> int:
    """Length of a file's header with the eight bytes that tell it."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _require_whole(place: str, file, size: int, header_bytes: int) -> None:
    told = header_bytes + max((info.data_offsets[1] for info in file.tensors.values()), default=0)
    if size < told:
        raise ValueError(
            f"{place} is cut short: it has {size:,} bytes, and its header tells of {told:,}; copy "
            "or download it again"
        )


def _headers(files: Mapping, size: int) -> Headers | None:
    """The tensors of all files; one whose name another file has too is named by its file."""
    tensors = {}
    for file_name, file in files.items():
        for name, info in file.tensors.items():
            tensors[f"{file_name}:{name}" if name in tensors else name] = info
    return Headers(tensors, size) if files else None
