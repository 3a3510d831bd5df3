"""The ``quantization_config`` of the parts of a model, for classes that load one part only.

``CLIPTextModel`` reads its config from ``text_config`` in CLIP's ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration import QuantizedModelConfig

_FIELD = "quantization_config"


def sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield the configs in a config, at any depth."""
    for key in config.sub_configs:
        if isinstance(part := getattr(config, key, None), PreTrainedConfig):
            yield part
            yield from sub_configs(part)


def describe_parts(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Store the plan of each part in its config: without the layers of the other parts."""
    parts = list(sub_configs(model.config))
    modules = [item for item in model.named_modules() if isinstance(item[1], PreTrainedModel)]
    prefixes = [
        tuple(f"{name}." for name, module in modules if name and type(module.config) is type(part))
        for part in parts
    ]
    for part, own in zip(parts, prefixes, strict=True):
        if not own:
            continue
        others = tuple(prefix for each in prefixes for prefix in each if prefix not in own)
        described = copy(config)
        described.plan = {
            name: dict(entry)
            for name, entry in config.plan.items()
            if name.startswith(own) or not name.startswith(others)
        }
        for entry in described.plan.values():
            if entry.get("tied_to", "") not in {"", *described.plan}:
                del entry["tied_to"]
        if described.plan:
            setattr(part, _FIELD, described.to_dict())


def forget_parts(model: PreTrainedModel) -> None:
    """Undo :func:`describe_parts`."""
    for part in sub_configs(model.config):
        vars(part).pop(_FIELD, None)
