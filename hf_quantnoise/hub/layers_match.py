"""Comparison of the layers of a packed model with its plan, before the model is saved."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration import QuantizedModelConfig
from ..modeling.convert import is_packed
from ..structure import is_layer
from .replaced_ties import untie_replaced
from .skeleton import quantizer_of

logger = logging.get_logger(__name__)

Modules = dict[str, nn.Module]


def match_plan_to_layers(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Remove layers from the plan that are dense again: a new head, or a resized table.

    Raises ValueError if a layer of the plan is missing or wrapped, or a packed layer is not stored
    as in the plan.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = [name for name in config.plan if not is_packed(modules.get(name))]
    for name in replaced:
        module: nn.Module | None = modules.get(name)
        if module is None or not is_layer(module):
            found = "is missing" if module is None else f"is a {type(module).__name__}"
            raise ValueError(
                f"cannot save the model as quantized: layer {name} of the plan {found} now; unload "
                "an adapter with peft_model.unload() or save only the adapter, put a regular layer "
                "there, or call model.dequantize()"
            )
    _require_planned(modules, config)
    for name in replaced:
        logger.warning(f"{name} was replaced after quantization; it is saved in floating point.")
        del config.plan[name]
        config.left_dense[name] = "replaced by a layer in floating point after it was quantized"
    if replaced:
        untie_replaced(model, config)


def _require_planned(modules: Modules, config: QuantizedModelConfig) -> None:
    """Raise ValueError if a packed layer is from another model, and stored in another way."""
    known = {id(modules.get(name)) for name in config.plan}
    for name, module in modules.items():
        if not is_packed(module):
            continue
        entry = config.plan.get(name)
        if entry is None and id(module) in known:  # another name of a layer of the plan
            continue
        if entry is None or quantizer_of(entry) != module.quantizer:
            expected = "dense" if entry is None else str(quantizer_of(entry))
            raise ValueError(
                f"cannot save the model as quantized: layer {name} is stored as "
                f"{module.quantizer}, but as {expected} in the plan of the model, as it is from "
                "another quantized model; call dequantize() on that model before you use "
                "its layers, or quantize both with the same settings"
            )
