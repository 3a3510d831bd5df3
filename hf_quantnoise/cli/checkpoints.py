"""Models in folders and repositories: what can be told without their weights, and loading."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..configuration import QUANT_METHOD, QuantizedModelConfig
from ..hub.auto import class_of
from ..hub.quantizer import QuantNoiseHfQuantizer
from ..sharing import share
from .command import UsageError
from .headers import Headers, hub_headers, local_headers


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
        """Its ``config.json``.

        Raises:
            FileNotFoundError: if it has none.
        """
        if not self.has_config:
            raise FileNotFoundError(f"{self.path!r} holds no {CONFIG_NAME}")
        with self._named():
            return AutoConfig.from_pretrained(self.path, revision=self.revision)

    @cached_property
    def has_config(self) -> bool:
        """Whether it has a ``config.json``; an adapter has none."""
        if os.path.isdir(self.path):
            return os.path.isfile(os.path.join(self.path, CONFIG_NAME))
        with self._named():
            try:
                hf_hub_download(self.path, CONFIG_NAME, revision=self.revision)
            except LocalEntryNotFoundError:
                raise  # the Hub was not reached: there may be one
            except EntryNotFoundError:
                return False
        return True

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Names the model in what the Hub's libraries say."""
        try:
            yield
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
    def foreign_method(self) -> str | None:
        """The method of another package that it is quantized by, or None."""
        return None if self.quant_method == QUANT_METHOD else self.quant_method

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
        """What its safetensors files say; None where it has none.

        Raises:
            ValueError: if one of them is cut short.
        """
        if os.path.isdir(self.path):
            return local_headers(self.path)
        with self._named():
            if constants.HF_HUB_OFFLINE:
                return local_headers(snapshot_download(self.path, revision=self.revision))
            return hub_headers(self.path, self.revision)

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
        if self.foreign_method is not None:
            raise ValueError(
                f"{self.path!r} is quantized by {self.foreign_method!r}; take the dense checkpoint "
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
            ValueError: if transformers has no class for it, another package quantized it, or its
                quantization config is refused.
        """
        if self.foreign_method is not None:
            raise ValueError(f"quantized by {self.foreign_method!r}")
        config = deepcopy(self.config)
        stored = getattr(config, "quantization_config", None)
        if stored is not None:
            del config.quantization_config
        dtype = self.headers.dtype if self.headers and stored is None else config.dtype
        with torch.device("meta"):
            model = self.model_class._from_config(config, dtype=dtype or torch.float32)
        model.tie_weights()
        return model if stored is None else _packed(model, QuantizedModelConfig.from_dict(stored))


def checkpoint_of(args: Namespace) -> Checkpoint:
    """The model that the flags of ``add_model_argument`` name.

    Raises:
        UsageError: for the revision of a folder, which has none.
    """
    if args.revision is not None and os.path.isdir(args.model):
        raise UsageError(
            f"--revision {args.revision!r} is of a repository, and {args.model!r} is a folder; "
            "take it out"
        )
    return Checkpoint(args.model, args.revision)


def _packed(model: PreTrainedModel, config: QuantizedModelConfig) -> PreTrainedModel:
    quantizer = QuantNoiseHfQuantizer(config)
    quantizer.preprocess_model(model)
    config = model.config.quantization_config = quantizer.quantization_config
    model.tie_weights()
    share(model, [(source, name) for name, source in config.shared_layers.items()])
    return model
