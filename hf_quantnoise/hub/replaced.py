"""Packed layers that a user has replaced since: the plan must say what the file will hold."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..blocks import layout_of
from ..configuration import QuantizedModelConfig
from ..modeling import is_packed

logger = logging.get_logger(__name__)

REASON = "replaced by a layer in floating point after it was quantized"


def follow_replaced(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Takes layers out of the plan that are plain ones by now: another head, or one that
    ``resize_token_embeddings`` made.

    Raises:
        ValueError: if a layer of the plan is wrapped in something else, or gone.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in [name for name in config.plan if not is_packed(modules.get(name))]:
        module = modules.get(name)
        if module is None or not _is_plain(module):
            found = "is not there" if module is None else f"is a {type(module).__name__}"
            raise ValueError(
                f"the model was quantized with a layer {name}, which {found} now, so it cannot be "
                "saved as quantized: unload an adapter (peft_model.unload()) or save the adapter "
                "alone, put a plain layer in its place, or call model.dequantize()"
            )
        logger.warning(f"{name} was replaced after quantization: it is saved in floating point.")
        del config.plan[name]
        config.left_dense[name] = REASON
    for entry in config.plan.values():
        if "tied_to" in entry and entry["tied_to"] not in config.plan:
            del entry["tied_to"]


def _is_plain(module: nn.Module) -> bool:
    return layout_of(module) is not None and "weight" in module._parameters
