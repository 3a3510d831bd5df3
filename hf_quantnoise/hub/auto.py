"""``AutoQuantizedModel``: loads a compressed model as the class it was saved from, or refuses it.

Dispatchers, like PEFT's AutoPeftModel: what they return is the real transformers class.
"""

from __future__ import annotations

import os
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from ..configuration import QUANT_METHOD

_CONFIG_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


class AutoQuantizedModel:
    """Loads a model compressed by this package, whatever its head.

    ``AutoQuantizedModel.from_pretrained(repo_or_folder)`` reads the class from the checkpoint;
    ``AutoQuantizedModelForSequenceClassification`` and its siblings name the head instead.
    """

    auto_class: type | None = None

    def __init__(self) -> None:
        raise TypeError(f"use {type(self).__name__}.from_pretrained(repo_or_folder)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Loads the model.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hub.
            kwargs: all that ``PreTrainedModel.from_pretrained`` takes.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: if the checkpoint is not one of this package's, or a file of it is torn.
            OSError: if a file is missing.
        """
        path = os.fspath(pretrained_model_name_or_path)
        config_kwargs = {key: kwargs[key] for key in _CONFIG_KWARGS if key in kwargs}
        given, place = kwargs.get("config"), path
        if isinstance(given, str | os.PathLike):
            place = os.fspath(given)
            given = kwargs["config"] = AutoConfig.from_pretrained(place, **config_kwargs)
        config = given or AutoConfig.from_pretrained(path, **config_kwargs)
        _check_method(place, getattr(config, "quantization_config", None))
        loader = cls.auto_class or _class_named(path, config.architectures)
        try:
            return loader.from_pretrained(path, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"a safetensors file of {path!r} cannot be read ({error}): it is cut short or "
                "damaged. Download or save the model again"
            ) from error


def _check_method(path: str, quantization: Any) -> None:
    if quantization is None:
        raise ValueError(
            f"{path!r} is not quantized (its config.json has no quantization_config); load it with "
            "transformers' AutoModel, which quantizes it with quantization_config=IPQConfig(), or "
            "compress it with quantize_model(model, IPQConfig())"
        )
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else quantization.quant_method
    )
    if method != QUANT_METHOD:
        raise ValueError(
            f"{path!r} has quant_method={method!r}, not {QUANT_METHOD!r}; load it with "
            "transformers' AutoModel and the package of that method"
        )


def class_of(architectures: list[str] | None) -> type[PreTrainedModel] | None:
    """The class of transformers that a config's ``architectures`` name, or None."""
    return getattr(transformers, architectures[0], None) if architectures else None


def _class_named(path: str, architectures: list[str] | None) -> type[PreTrainedModel]:
    name, found = (architectures or [None])[0], class_of(architectures)
    if found is None:
        raise ValueError(
            f"{path!r}: transformers has no class {name!r} (architectures={architectures!r} in its "
            "config.json); name the head: AutoQuantizedModelForSequenceClassification, ..."
        )
    return found


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
