"""Quantization in one shot: no training, and no data but for calibration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..configuration import QuantizedModelConfig
from ..modeling import packed_layers
from ..modeling.activations import calibrate, require_batches
from ..modeling.packer import ModelPacker
from ..noise import find_state, remove_quant_noise
from .bit_allocation.allocate import within_target


def without_noise(model: nn.Module, config: QuantizedModelConfig) -> QuantizedModelConfig:
    """Takes the noise out of a model, in place.

    Returns:
        The config; where it leaves ``share_layers`` open, with what the noise shared.
    """
    state = find_state(model)
    remove_quant_noise(model)
    if state is None or config.share_layers is not None:
        return config
    return replace(config, share_layers=state.config.share_layers)


def quantize_model(
    model: PreTrainedModel,
    config: QuantizedModelConfig,
    progress: bool = True,
    calibration_data: Iterable[dict] | None = None,
) -> PreTrainedModel:
    """Quantizes a model in one shot (the traditional PQ of section 3.2, or intN of section 3.1).

    Args:
        model: a dense model, converted in place; noise is removed first.
        config: :class:`IPQConfig` or :class:`FixedPointConfig`.
        progress: show progress bars, and how a target was allotted.
        calibration_data: a few batches, each the keyword arguments of a forward; needed where
            ``config.activation_bits`` is set (7.7) or ``config.importance`` is
            ``"activations"``, of use where a target is (``budget.py``), and not read otherwise.

    Returns:
        The same object, packed: ``save_pretrained``, ``push_to_hub`` and ``Trainer`` take it.

    Raises:
        TypeError: if the model is no ``PreTrainedModel``.
        ValueError: if it is quantized already, the config cannot be carried out, its target cannot
            be met, or it needs calibration data and there is none, or none that a layer runs on;
            the model is dense then as before.
    """
    batches: list[dict] = []
    if config.reads_data or config.target is not None:
        batches = list(calibration_data or [])
    if config.reads_data:
        require_batches(batches, config.reads_data)
    config = within_target(model, without_noise(model, config), batches, progress)
    packer = ModelPacker(model, config)
    if config.reads_data:
        packer.require_runs(batches)
    packer.pack_all(progress, batches if config.reads_data else ())
    calibrate(model, [layer for _, layer in packed_layers(model)], batches)
    return model
