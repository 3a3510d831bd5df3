"""Quantization in one shot: no training, no data."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..configuration import QuantizedModelConfig
from ..hub.packer import ModelPacker
from ..noise import remove_quant_noise


def quantize_model(
    model: PreTrainedModel, config: QuantizedModelConfig, progress: bool = True
) -> PreTrainedModel:
    """Quantizes a model in one shot (the traditional PQ of section 3.2, or intN of section 3.1).

    Args:
        model: a dense model, converted in place; noise is removed first.
        config: :class:`IPQConfig` or :class:`FixedPointConfig`.
        progress: show a progress bar.

    Returns:
        The same object, packed: ``save_pretrained``, ``push_to_hub`` and ``Trainer`` take it.

    Raises:
        TypeError: if the model is no ``PreTrainedModel``.
        ValueError: if it is quantized already, or the config cannot be carried out.
    """
    remove_quant_noise(model)
    ModelPacker(model, config).pack_all(progress)
    return model
