"""Whether a model can be packed."""

from __future__ import annotations

from torch import nn

from ..argument_checks import require_model
from ..compat import stop_rescaling
from ..compat.peft import has_adapters
from .convert import packed_layers


def check_can_be_packed(model: nn.Module) -> None:
    """Check that a model can be packed.

    Raises:
        TypeError: if it is not a ``PreTrainedModel``.
        ValueError: if it is quantized, or has adapters.

    An RWKV model stops rescaling its weights, here and not later, since each entry point calls this
    before it copies or evaluates the model (:func:`stop_rescaling`).
    """
    if isinstance(model, nn.Module) and has_adapters(model):
        raise ValueError(
            f"invalid model: {type(model).__name__} has PEFT adapters, which cannot be packed; "
            "merge them first, and use the result of peft_model.merge_and_unload() (in a trainer: "
            "trainer.model = trainer.model.merge_and_unload())"
        )
    require_model(model)
    if any(packed_layers(model)):
        raise ValueError(
            "the model is already quantized; call model.dequantize() first, or load the dense model"
        )
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None) or "another method"
        raise ValueError(
            f"the model is already quantized with {getattr(method, 'value', method)}; load the "
            "dense checkpoint instead"
        )
    stop_rescaling(model)
