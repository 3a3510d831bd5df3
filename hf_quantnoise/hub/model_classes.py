"""The class of a model: of transformers, registered by the user, or in a file next to the model."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from ..compat import models_of
from ..text import shown

# Arguments of from_pretrained for the place of the files.
HUB_KWARGS = (
    "cache_dir", "force_download", "local_files_only", "proxies",
    "revision", "subfolder", "token",
)  # fmt: skip


def class_of(architectures: Any) -> type[PreTrainedModel] | None:
    """Return the transformers class named by a config's ``architectures``, or None.

    Only models count: a file may name a tokenizer, an auto class or a function of transformers.
    """
    if (name := _name_in(architectures)) is None:
        return None
    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # of its file, which transformers imports on demand
        return None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        return None
    return found if found.forward is not PreTrainedModel.forward else None


def model_class_of(
    config: PreTrainedConfig, path: str, trust_remote_code: bool = False, **kwargs: Any
) -> type[PreTrainedModel]:
    """Return the class that a config names.

    Args:
        config: read with the same ``trust_remote_code``.
        path: folder or repository of the model.
        trust_remote_code: whether to run the code that ``auto_map`` names.
        kwargs: where the files are (``HUB_KWARGS``).

    Raises:
        ValueError: if the class is not known.
    """
    found = None
    if (name := _name_in(config.architectures)) is not None:
        found = _class_in_files(config, name, path, kwargs) if trust_remote_code else None
        if found is None and type(config).__module__.startswith("transformers."):
            found = class_of(config.architectures)
        found = found or _registered_class(config, name)
    if found is None:
        raise ValueError(
            f"invalid architectures={shown(config.architectures)} in config.json of {path!r}: "
            "expected a model class of transformers or a registered one; register it, load the "
            "model with AutoQuantizedModelFor..., or pass trust_remote_code=True "
            "(--trust_remote_code) if its code is stored with the model and you have read it"
        )
    return found


def _name_in(architectures: Any) -> str | None:
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return name if isinstance(name, str) else None


def _class_in_files(
    config: PreTrainedConfig, name: str, path: str, kwargs: dict[str, Any]
) -> type[PreTrainedModel] | None:
    """Return the class of a name in ``auto_map``, which is saved with the model again."""
    auto_map = getattr(config, "auto_map", None) or {}
    for auto_class, reference in auto_map.items():
        if not isinstance(reference, str) or reference.rpartition(".")[2] != name:
            continue
        where = {key: value for key, value in kwargs.items() if key != "subfolder"}
        found: Any = get_class_from_dynamic_module(reference, path, **where)
        found.register_for_auto_class(auto_class)
        return found
    return None


def _registered_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel] | None:
    """Return the class of a name that an auto class knows for a config, or None."""
    for auto_class in (name for name in dir(modeling_auto) if name.startswith("AutoModel")):
        if not hasattr(getattr(modeling_auto, auto_class), "from_config"):
            continue
        found = models_of(getattr(modeling_auto, auto_class)).get(type(config), ())
        for cls in found if isinstance(found, tuple | list) else (found,):
            if getattr(cls, "__name__", None) == name:
                return cls
    return None


def load_complete(loader: Any, path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model whose weights are all in its files.

    Args:
        loader: the class whose ``from_pretrained`` loads it.
        path: folder or repository of the model.
        kwargs: of ``from_pretrained``.

    Raises:
        ValueError: if weights are missing, as those of a head; transformers makes them random.
    """
    model, found = loader.from_pretrained(path, output_loading_info=True, **kwargs)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{path!r} lacks {len(missing)} weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}, ...), which would be random; finetune the model "
            "first, or correct architectures in its config.json"
        )
    return model
