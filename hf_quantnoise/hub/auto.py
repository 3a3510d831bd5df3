"""``AutoQuantizedModel`` and its siblings load compressed models with any head.

Like PEFT's AutoPeftModel they are dispatchers: they return a model of the real transformers class.
"""

from __future__ import annotations

import os
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..argument_checks import require_path, shorten
from ..configuration import QUANT_METHOD
from ..repository import is_repository_name

_CONFIG_KWARGS = (
    "cache_dir", "force_download", "local_files_only", "proxies",
    "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip


class AutoQuantizedModel:
    """Loads a model compressed by this package, with any head.

    ``AutoQuantizedModel.from_pretrained(repo_or_folder)`` reads the class from the checkpoint;
    ``AutoQuantizedModelForSequenceClassification`` and its siblings load a given head instead.
    """

    auto_class: Any = None

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} cannot be instantiated; use {name}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a model from a folder or a repository of the Hub, in eval mode.

        Args:
            pretrained_model_name_or_path: the folder or repository.
            kwargs: arguments of ``PreTrainedModel.from_pretrained``.

        Raises:
            ValueError: if the checkpoint is not from this package, or a file is corrupted.
            OSError: if a file is missing.
            TypeError: if the path is something else.
        """
        path = require_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        config_kwargs = {key: kwargs[key] for key in _CONFIG_KWARGS if key in kwargs}
        config, config_path = kwargs.get("config"), path
        if isinstance(config, str | os.PathLike):
            config_path = os.fspath(config)
            config = kwargs["config"] = AutoConfig.from_pretrained(config_path, **config_kwargs)
        config = config or _config_of(path, **config_kwargs)
        _check_method(config_path, getattr(config, "quantization_config", None))
        loader = cls.auto_class or class_of(config.architectures)
        if loader is None:
            raise ValueError(
                f"invalid architectures={config.architectures!r} in config.json of {path!r}: "
                "transformers has no class of that name; load it with a class for its head, such "
                "as AutoQuantizedModelForSequenceClassification"
            )
        try:
            return loader.from_pretrained(path, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"cannot read a safetensors file of {path!r}, which is truncated or corrupted "
                f"({error}); download or save the model again"
            ) from error


def _config_of(path: str, **kwargs: Any) -> PreTrainedConfig:
    """Return the config of a saved model; the error says what is at the path instead."""
    if os.path.isfile(path):
        raise ValueError(f"{path!r} is a file; pass the folder of the saved model")
    if os.path.isdir(path):
        file = os.path.join(path, kwargs.get("subfolder") or "", CONFIG_NAME)
        if not os.path.isfile(file):
            raise FileNotFoundError(
                f"{file!r} is missing; pass the folder that save_pretrained has written"
            )
    elif not is_repository_name(path):
        raise FileNotFoundError(
            f"{path!r} is neither a folder nor a valid name of a repository; check the path"
        )
    try:
        return AutoConfig.from_pretrained(path, **kwargs)
    except OSError as error:
        source = "its config.json" if os.path.isdir(path) else "the repository (and no such folder)"
        raise OSError(
            f"cannot load {path!r}: {source} cannot be read ({shorten(str(error))}); check the "
            "name, or save the model again"
        ) from error


def _check_method(path: str, quantization: Any) -> None:
    if quantization is None:
        raise ValueError(
            f"{path!r} is not quantized (no quantization_config in config.json); load it with "
            "transformers' AutoModel, optionally with quantization_config=IPQConfig(), or compress "
            "it with quantize_model(model, IPQConfig())"
        )
    is_json = isinstance(quantization, dict)
    method = quantization.get("quant_method") if is_json else quantization.quant_method
    if method != QUANT_METHOD:
        raise ValueError(
            f"invalid quant_method={method!r} in {path!r}, expected {QUANT_METHOD!r}; load it with "
            "transformers' AutoModel and the package of that method"
        )


def class_of(architectures: list[str] | None) -> type[PreTrainedModel] | None:
    """Return the transformers class named by a config's ``architectures``, or None."""
    return getattr(transformers, architectures[0], None) if architectures else None


def _for_head(head: str) -> type[AutoQuantizedModel]:
    return type(
        f"AutoQuantizedModelFor{head}",
        (AutoQuantizedModel,),
        {
            "auto_class": getattr(transformers, f"AutoModelFor{head}"),
            "__doc__": f"Loads a compressed model with the head of ``AutoModelFor{head}``.",
            "__module__": __name__,
        },
    )


AutoQuantizedModelForCausalLM = _for_head("CausalLM")
AutoQuantizedModelForImageClassification = _for_head("ImageClassification")
AutoQuantizedModelForMaskedLM = _for_head("MaskedLM")
AutoQuantizedModelForQuestionAnswering = _for_head("QuestionAnswering")
AutoQuantizedModelForSeq2SeqLM = _for_head("Seq2SeqLM")
AutoQuantizedModelForSequenceClassification = _for_head("SequenceClassification")
AutoQuantizedModelForTokenClassification = _for_head("TokenClassification")
