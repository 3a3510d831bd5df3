"""``AutoQuantizedModel`` and its siblings load compressed models with any head.

Like PEFT's AutoPeftModel they are dispatchers: they return a model of the real transformers class.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from ..argument_checks import require_path
from ..configuration import QUANT_METHOD
from ..files.model_folders import require_not_interrupted
from ..files.reading import headers_in, read_json
from ..modeling.packed import INDICES
from ..modeling.value_check import values_unchecked
from ..repository import is_repository_name, missing_model
from ..text import printable, shown
from .model_classes import HUB_KWARGS, model_class_of

TRUST = "trust_remote_code"


class AutoQuantizedModel:
    """Loads a model that was compressed by this package, with any head.

    ``AutoQuantizedModel.from_pretrained(repo_or_folder)`` reads the class from the checkpoint;
    ``AutoQuantizedModelForSequenceClassification`` and its siblings load a given head instead.
    """

    auto_class: Any = None

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} cannot be instantiated; use {name}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, check: bool = True, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a model from a folder or a repository of the Hub, in eval mode.

        Args:
            pretrained_model_name_or_path: the folder or repository.
            check: whether to check the values of packed layers: codes within the codebook, finite
                centroids, scales above 0. Names, shapes and dtypes are always checked.
            kwargs: arguments of ``PreTrainedModel.from_pretrained``. ``trust_remote_code=True``
                runs the code that ``auto_map`` in ``config.json`` names.

        Raises:
            ValueError: if the checkpoint is not from this package, or a file is corrupted.
            OSError: if a file is missing.
            TypeError: if the path has another type.
        """
        path = require_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        require_not_interrupted(os.path.join(path, kwargs.get("subfolder") or ""))
        # By default transformers would ask on the terminal, and wait for an answer.
        kwargs.setdefault(TRUST, False)
        config_kwargs = {key: kwargs[key] for key in (*HUB_KWARGS, TRUST) if key in kwargs}
        config, config_path = kwargs.get("config"), path
        if isinstance(config, str | os.PathLike):
            config_path = os.fspath(config)
            config = kwargs["config"] = read_config(config_path, **config_kwargs)
        config = config or _config_of(path, **config_kwargs)
        _check_method(config_path, getattr(config, "quantization_config", None))
        loader = cls.auto_class or model_class_of(config, config_path, **config_kwargs)
        with _damaged_files_named(path, kwargs), nullcontext() if check else values_unchecked():
            loaded: Any = loader.from_pretrained(path, **{**kwargs, "output_loading_info": True})
        model, info = loaded
        # The weight of a layer of another shape (a new head) is stored as codes, which mismatch.
        mismatched = (key for key, *_ in info["mismatched_keys"])
        reshaped = {f"{k.removesuffix(INDICES)}weight" for k in mismatched if k.endswith(INDICES)}
        _require_complete(path, model, set(info["missing_keys"]) - reshaped)
        return loaded if kwargs.get("output_loading_info") else model


def _require_complete(path: str, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raise if tensors are missing, which are random, although this class saved the checkpoint."""
    names = sorted(missing)
    if names and type(model).__name__ in (model.config.architectures or ()):
        raise ValueError(
            f"{path!r} lacks {len(names)} tensors of {type(model).__name__} "
            f"({', '.join(names[:3])}, ...): a file is missing or belongs to another model; "
            "download or save the model again"
        )


def read_config(path: str, **kwargs: Any) -> PreTrainedConfig:
    """Return the config of a model.

    Raises:
        ValueError: if ``config.json`` is damaged or describes no model.
        OSError: if it is missing.
    """
    if (file := _config_file_here(path, kwargs)) is not None:
        read_json(file)
    try:
        return AutoConfig.from_pretrained(path, **kwargs)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # of any type, from the config class of any model
        raise ValueError(
            f"invalid config.json of {path!r} ({type(error).__name__}: {printable(error)}); "
            "download or save it again"
        ) from error


def _config_file_here(path: str, kwargs: dict[str, Any]) -> str | None:
    """Return the path of a model's ``config.json`` if it is on this machine, or None."""
    where = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder") if key in kwargs}
    with suppress(OSError):
        found: str | None = cached_file(path, CONFIG_NAME, local_files_only=True, **where)
        return found
    return None


@contextmanager
def _damaged_files_named(path: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Raise a ``ValueError`` that names the file if the index or a header is damaged.

    Those of a folder are checked before they are used, those of a repository, which are not here
    yet, after an error.
    """

    def check() -> None:
        config = _config_file_here(path, kwargs)
        if config is not None and kwargs.get("variant") is None:
            headers_in(os.path.dirname(config))

    if is_folder := os.path.isdir(path):
        check()
    try:
        yield
    except Exception as error:
        if not is_folder:
            with suppress(OSError):  # not downloaded
                check()
        if isinstance(error, SafetensorError):
            raise ValueError(
                f"cannot read a safetensors file of {path!r}, which is truncated or corrupted "
                f"({printable(error)}); download or save the model again"
            ) from error
        if isinstance(error, RuntimeError) and "mismatch" in str(error):
            raise ValueError(
                f"the tensors of {path!r} do not have the shapes of this model "
                f"({printable(error)}); restore config.json and the files from one save, or pass "
                "ignore_mismatched_sizes=True if you want a new head (num_labels=...)"
            ) from error
        raise


def _config_of(path: str, **kwargs: Any) -> PreTrainedConfig:
    """Return the config of a saved model; raise an error that names what is at the path instead."""
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
        return read_config(path, **kwargs)
    except OSError as error:
        if os.path.isdir(path):
            raise
        raise OSError(f"cannot load {path!r}: {missing_model(path, error)}") from error
    except ValueError as error:
        if os.path.isdir(path) or _config_file_here(path, kwargs) is not None:
            raise
        file = "/".join(filter(None, (kwargs.get("subfolder"), CONFIG_NAME)))
        raise FileNotFoundError(
            f"repository {path!r} has no {file}; check its name, revision and subfolder"
        ) from error


def _check_method(path: str, quantization: Any) -> None:
    if quantization is None:
        raise ValueError(
            f"{path!r} is not quantized (no quantization_config in config.json); load it with "
            "transformers' AutoModel, optionally with quantization_config=IPQConfig(), or compress "
            "it with quantize_model(model, IPQConfig())"
        )
    if (method := method_of(quantization)) != QUANT_METHOD:
        raise ValueError(
            f"invalid quant_method={shown(method)} in {path!r}, expected {QUANT_METHOD!r}; load it "
            "with transformers' AutoModel and the package of that method"
        )


def method_of(quantization: Any) -> Any:
    """Return the method of a ``quantization_config``, which may be a dict of any content."""
    if isinstance(quantization, dict):
        return quantization.get("quant_method")
    return getattr(quantization, "quant_method", None)


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
