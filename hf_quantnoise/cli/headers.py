"""Headers of safetensors files: names, types and sizes, without the values."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import NotASafetensorsRepoError

from ..files.reading import FLOATS, TensorHeader, damaged, headers_in


@dataclass(frozen=True)
class Headers:
    """Headers of the safetensors files of a model."""

    tensors: dict[str, TensorHeader]
    file_bytes: int  # size of the files, headers included

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating-point type of most values, or None if there are none."""
        counts: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in FLOATS:
                counts[FLOATS[tensor.dtype]] += tensor.parameter_count
        return counts.most_common(1)[0][0] if counts else None


def local_headers(folder: str) -> Headers | None:
    """Return the headers of the model (or adapter) in a folder, or None without such files."""
    files = {name: header.tensors for name, header in headers_in(folder).items()}
    return _headers(files, sum(os.path.getsize(os.path.join(folder, name)) for name in files))


def hub_headers(repo: str, revision: str | None) -> Headers | None:
    """Return the headers of a repository's model; only the beginning of each file is read."""
    api = HfApi()
    try:
        files = api.get_safetensors_metadata(repo, revision=revision).files_metadata
    except NotASafetensorsRepoError:
        files = {
            name: api.parse_safetensors_file_metadata(repo, name, revision=revision)
            for name in sorted(api.list_repo_files(repo, revision=revision))
            if name.endswith(".safetensors") and "/" not in name
        }
    total, tensors = 0, {}
    for file_name, file in files.items():
        url = hf_hub_url(repo, file_name, revision=revision)
        tensors[file_name] = {
            name: TensorHeader.of(url, name, info.dtype, info.shape, info.data_offsets)
            for name, info in file.tensors.items()
        }
        size = get_hf_file_metadata(url).size or 0
        # A lower bound: the length of the header is unknown.
        least = 8 + max((each.data_offsets[1] for each in tensors[file_name].values()), default=0)
        if size < least:
            raise damaged(url, f"it has {size:,} bytes, its header describes {least:,}")
        total += size
    return _headers(tensors, total)


def _headers(files: Mapping[str, Mapping[str, TensorHeader]], size: int) -> Headers | None:
    """Merge the headers of all files; a tensor name that occurs twice gets the file name."""
    tensors = {}
    for file_name, file in files.items():
        for name, info in file.items():
            tensors[f"{file_name}:{name}" if name in tensors else name] = info
    return Headers(tensors, size) if files else None
