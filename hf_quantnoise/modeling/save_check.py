"""Refuses to save packed layers without the plan that is needed to load them."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..compat import check_before_saving, has_adapter
from ..configuration import QuantizedModelConfig
from .convert import packed_layers


def _require_plan(model: PreTrainedModel) -> None:
    """Raise ValueError if a model has packed layers, but was not quantized itself.

    It is a part of a packed model, or contains one. Only an adapter is saved without the layers.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if isinstance(config, QuantizedModelConfig) or has_adapter(model):
        return
    name = next((name for name, _ in packed_layers(model)), None)
    if name is not None:
        raise ValueError(
            f"cannot save this {type(model).__name__}: its layer {name} is quantized, and only the "
            "model that was quantized or loaded knows how it is stored; save that model (from its "
            "folder, classes of its parts load as well), or call dequantize() on it first"
        )


check_before_saving(_require_plan)
