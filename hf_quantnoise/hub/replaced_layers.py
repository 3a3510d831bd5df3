"""Packed layers that the user has replaced since: the plan must describe the file as written."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration import QuantizedModelConfig
from ..modeling import is_packed
from ..structure import is_layer

logger = logging.get_logger(__name__)

REASON = "replaced by a layer in floating point after it was quantized"


def drop_replaced_layers(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Remove layers from the plan that are dense again: a new head, or a resized table.

    Raises:
        ValueError: if a layer of the plan is missing, or wrapped in another module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in [name for name in config.plan if not is_packed(modules.get(name))]:
        module: nn.Module | None = modules.get(name)
        if module is None or not is_layer(module):
            found = "is missing" if module is None else f"is a {type(module).__name__}"
            raise ValueError(
                f"cannot save the model as quantized: layer {name} of the plan {found} now; unload "
                "an adapter with peft_model.unload() or save only the adapter, put a regular layer "
                "there, or call model.dequantize()"
            )
        logger.warning(f"{name} was replaced after quantization; it is saved in floating point.")
        del config.plan[name]
        config.left_dense[name] = REASON
    for entry in config.plan.values():
        if "tied_to" in entry and entry["tied_to"] not in config.plan:
            del entry["tied_to"]
