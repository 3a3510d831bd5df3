"""Models in folders and repositories: what can be told without their weights, and loading."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_local_safetensors_metadata,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..configuration import QUANT_METHOD, QuantizedModelConfig
from ..hub.auto import class_of
from ..hub.quantizer import QuantNoiseHfQuantizer
from ..sharing import share

# Names of floating-point dtypes in a safetensors header.
FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip


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


@dataclass(frozen=True)
class Checkpoint:
    """A model in a folder or a repository of the Hub.

    Args:
        path: either.
        revision: branch, tag or commit of a repository.
    """

    path: str
    revision: str | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        """Its ``config.json``."""
        with self._named():
            return AutoConfig.from_pretrained(self.path, revision=self.revision)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Names the model in what the Hub's libraries say."""
        try:
            yield
        except NotASafetensorsRepoError:
            raise  # an answer, not a failure
        except Exception as error:  # of a client's own kind, where the Hub is not reached
            if os.path.isdir(self.path):
                raise
            raise ValueError(
                f"{self.path!r} is no folder, and cannot be read as a repository: {error}"
            ) from error

    @property
    def quant_method(self) -> str | None:
        """The method that it is quantized by, or None."""
        stored = getattr(self.config, "quantization_config", None)
        return None if stored is None else str(stored.get("quant_method"))

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class it was saved from.

        Raises:
            ValueError: if transformers has no such class.
        """
        if (found := class_of(self.config.architectures)) is None:
            raise ValueError(
                f"{self.path!r}: transformers has no class for architectures="
                f"{self.config.architectures!r} of its config.json; write the name of one there"
            )
        return found

    @cached_property
    def headers(self) -> Headers | None:
        """What its safetensors files say; None where it has none."""
        try:
            return (
                self._local_headers(self.path) if os.path.isdir(self.path) else self._hub_headers()
            )
        except NotASafetensorsRepoError:
            return None

    def _local_headers(self, folder: str) -> Headers:
        files = get_local_safetensors_metadata(folder).files_metadata
        size = sum(os.path.getsize(os.path.join(folder, name)) for name in files)
        return _headers(files, size)

    def _hub_headers(self) -> Headers:
        with self._named():
            if constants.HF_HUB_OFFLINE:
                return self._local_headers(snapshot_download(self.path, revision=self.revision))
            found = HfApi().get_safetensors_metadata(self.path, revision=self.revision)
            files = found.files_metadata
            urls = [hf_hub_url(self.path, name, revision=self.revision) for name in files]
            return _headers(files, sum(get_hf_file_metadata(url).size or 0 for url in urls))

    def files(self, patterns: tuple[str, ...]) -> str:
        """The folder with those of its files that fit the patterns; downloaded where need be."""
        if os.path.isdir(self.path):
            return self.path
        return snapshot_download(self.path, revision=self.revision, allow_patterns=list(patterns))

    def require_dense(self) -> None:
        """Refuses what is quantized already.

        Raises:
            ValueError: with the way to a dense model.
        """
        if self.quant_method == QUANT_METHOD:
            raise ValueError(
                f"{self.path!r} is quantized already; `hf-quantnoise convert {self.path} OUT "
                "--to dense` makes a plain model of it"
            )
        if self.quant_method is not None:
            raise ValueError(
                f"{self.path!r} is quantized by {self.quant_method!r}; take the dense checkpoint "
                "it was made from"
            )

    def load(self) -> PreTrainedModel:
        """The model with its weights, in the type they are stored in.

        Raises:
            ValueError: if weights are missing.
        """
        model, found = self.model_class.from_pretrained(
            self.path, revision=self.revision, output_loading_info=True
        )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"{self.path!r} lacks {len(missing)} weights of {type(model).__name__} "
                f"({', '.join(missing[:3])}, ...), which would be random; finetune it first, or "
                "correct architectures in its config.json"
            )
        return model

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: shapes, dtypes and ties, no numbers. A packed one has the
        packed layers of its plan.

        Raises:
            ValueError: if transformers has no class for it, or its quantization config is refused.
        """
        config = deepcopy(self.config)
        stored = getattr(config, "quantization_config", None)
        if stored is not None:
            del config.quantization_config
        dtype = self.headers.dtype if self.headers and stored is None else config.dtype
        with torch.device("meta"):
            model = self.model_class._from_config(config, dtype=dtype or torch.float32)
        model.tie_weights()
        return model if stored is None else _packed(model, QuantizedModelConfig.from_dict(stored))


def _headers(files: dict, size: int) -> Headers:
    tensors = {name: info for file in files.values() for name, info in file.tensors.items()}
    return Headers(tensors, size)


def _packed(model: PreTrainedModel, config: QuantizedModelConfig) -> PreTrainedModel:
    quantizer = QuantNoiseHfQuantizer(config)
    quantizer.preprocess_model(model)
    config = model.config.quantization_config = quantizer.quantization_config
    model.tie_weights()
    share(model, [(source, name) for name, source in config.shared_layers.items()])
    return model
