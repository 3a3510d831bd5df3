"""Models in folders and repositories: inspected without their weights, or loaded."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..compat import from_config
from ..configuration import QUANT_METHOD, QuantizedModelConfig
from ..files.model_folders import require_not_interrupted
from ..hub.auto import AutoQuantizedModel, method_of, read_config
from ..hub.model_classes import load_complete, model_class_of
from ..hub.quantizer import QuantNoiseHfQuantizer
from ..modeling.float16 import round_to_float16
from ..repository import missing_model
from ..sharing import share
from ..text import printable
from .command import UsageError
from .headers import Headers, hub_headers, local_headers


@dataclass(frozen=True)
class Checkpoint:
    """A model in a folder, or in a repository on the Hub at a branch, tag or commit."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def config(self) -> PretrainedConfig:
        """The content of ``config.json``."""
        require_not_interrupted(self.path)
        if not self.has_config:
            raise FileNotFoundError(
                f"{self.path!r} has no {CONFIG_NAME}; pass the folder of a saved model"
            )
        with self._error_context():
            try:
                return read_config(self.path, **self._where)
            except ValueError as error:
                if "trust_remote_code" not in str(error):
                    raise
                raise ValueError(
                    f"{self.path!r} needs code that is stored with the model; read it, then pass "
                    "--trust_remote_code to run it"
                ) from error

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @cached_property
    def has_config(self) -> bool:
        """Whether there is a ``config.json``; an adapter has none."""
        if os.path.isdir(self.path):
            return os.path.isfile(os.path.join(self.path, CONFIG_NAME))
        with self._error_context():
            try:
                hf_hub_download(self.path, CONFIG_NAME, revision=self.revision)
            except LocalEntryNotFoundError:
                raise  # the Hub cannot be reached: there may be one
            except EntryNotFoundError:
                return False
        return True

    @contextmanager
    def _error_context(self) -> Iterator[None]:
        """Raise errors of the Hub's client with the name of the model."""
        try:
            yield
        except Exception as error:  # any type, depending on the HTTP client
            if os.path.isdir(self.path) or "--trust_remote_code" in str(error):
                raise
            raise ValueError(missing_model(self.path, error)) from error

    @property
    def quant_method(self) -> str | None:
        """Quantization method of the model, or None."""
        stored = getattr(self.config, "quantization_config", None)
        return None if stored is None else printable(method_of(stored))

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The model class in ``architectures``."""
        return model_class_of(self.config, self.path, **self._where)

    @cached_property
    def headers(self) -> Headers | None:
        """Headers of the safetensors files, or None if there are none."""
        if os.path.isdir(self.path):
            return local_headers(self.path)
        with self._error_context():
            if constants.HF_HUB_OFFLINE:
                return local_headers(snapshot_download(self.path, revision=self.revision))
            return hub_headers(self.path, self.revision)

    def require_dense(self) -> None:
        """Raise a ``ValueError`` if the model is quantized."""
        if self.quant_method == QUANT_METHOD:
            raise ValueError(
                f"{self.path!r} is quantized already; make it dense first with `hf-quantnoise "
                f"convert {self.path} OUT --to dense`"
            )
        if self.quant_method is not None:
            raise ValueError(
                f"{self.path!r} is quantized by {self.quant_method!r}; pass the dense checkpoint "
                "that it was made from"
            )

    def require_packed(self, argument: str) -> None:
        """Raise a ``ValueError`` unless this package has packed the model."""
        if self.quant_method is None:
            raise ValueError(
                f"invalid {argument} {self.path!r}: got a dense model, expected a packed one; "
                f"compress it first: hf-quantnoise compress {self.path} OUT"
            )
        if self.quant_method != QUANT_METHOD:
            raise ValueError(
                f"invalid {argument} {self.path!r}: got a model quantized by "
                f"{self.quant_method!r}, expected one packed by {QUANT_METHOD}; pass another"
            )

    def load(self) -> PreTrainedModel:
        """Load the model, in the dtype of its file."""
        return load_complete(self.model_class, self.path, **self._where)

    def load_packed(self) -> PreTrainedModel:
        """Load a model that this package has packed."""
        _ = self.config  # raises if --trust_remote_code is missing
        return AutoQuantizedModel.from_pretrained(self.path, **self._where)

    @cached_property
    def quantization(self) -> QuantizedModelConfig | None:
        """How a model packed by this package is stored, or None if it is not packed."""
        if self.quant_method != QUANT_METHOD:
            return None
        return QuantizedModelConfig.from_dict(self.config.quantization_config)

    def skeleton(self) -> PreTrainedModel:
        """Return the dense model on the meta device."""
        if self.quant_method not in (None, QUANT_METHOD):
            raise ValueError(f"quantized by {self.quant_method!r}")
        config = deepcopy(self.config)
        dtype = config.dtype
        if self.quant_method is not None:
            del config.quantization_config
        elif self.headers:
            dtype = self.headers.dtype
        with torch.device("meta"):
            model = from_config(self.model_class, config, dtype=dtype or torch.float32)
        model.tie_weights()
        return model

    def pack(self, skeleton: PreTrainedModel) -> None:
        """Give the layers of a skeleton their packed form, in place, if the model is packed."""
        if self.quantization is None or self.headers is None:
            return
        quantizer = QuantNoiseHfQuantizer(self.quantization)
        quantizer.preprocess_model(skeleton, stored=self.headers.tensors)
        config = skeleton.config.quantization_config = quantizer.quantization_config
        skeleton.tie_weights()
        share(skeleton, [(source, name) for name, source in config.shared_layers.items()])
        if config.leftover_bits < 32:
            tensors, files = skeleton.state_dict(keep_vars=True), self.headers.tensors
            larger = {name for name, tensor in files.items() if tensor.dtype != "F16"}
            round_to_float16(skeleton, {id(tensors[name]) for name in larger & tensors.keys()})


def checkpoint_of(args: Namespace) -> Checkpoint:
    """Return the model that the flags of ``add_model_argument`` name."""
    if args.revision is not None and os.path.isdir(args.model):
        raise UsageError(
            f"--revision {args.revision!r} requires a repository, {args.model!r} is a folder; "
            "remove it"
        )
    return Checkpoint(args.model, args.revision, args.trust_remote_code)
