"""One-shot quantization: no training, and no data except for calibration."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from ..argument_checks import read_batches, require_instance, require_weights, run_batch
from ..batch_norm import (
    Statistics,
    bn_stats_of_packed_weights,
    measure_bn_stats,
    tracking_norms,
    warn_without_data,
)
from ..configuration import QuantizedModelConfig
from ..configuration.row_groups import why_no_row_groups
from ..lookups import with_number_of_rows
from ..modeling import packed_layers
from ..modeling.activations import calibrate, require_batches
from ..modeling.packable import check_can_be_packed
from ..modeling.packer import ModelPacker
from ..modeling.rollback import ModelSnapshot
from ..noise import find_state, remove_quant_noise
from .bit_allocation.allocate import resolve_target
from .fitted_noise import data_needed_by, fitted_noise, lookups_for

logger = logging.getLogger(__name__)

_BATCHES = "pass batches for which model(**batch) works, of 2 examples or more for BatchNorm"


def remove_noise(model: nn.Module, config: QuantizedModelConfig) -> QuantizedModelConfig:
    """Remove the noise of a model in place; return the config with its ``share_layers``.

    If the config sets ``share_layers``, it is returned unchanged.
    """
    state = find_state(model)
    remove_quant_noise(model)
    if state is None or config.share_layers is not None:
        return config
    return replace(config, share_layers=state.config.share_layers)


def _why_unused(config: QuantizedModelConfig, model: nn.Module) -> str:
    """Return why a model is packed without calibration data, although there is some."""
    if not config.counts_lookups:
        return (
            "the config has neither activation_bits, nor importance='activations', nor "
            "frequent_rows, nor a target size, and the model has no BatchNorm"
        )
    counted = "the noise of the model has counted the lookups"
    return why_no_row_groups(config, model) or counted


def quantize_model(
    model: PreTrainedModel,
    config: QuantizedModelConfig,
    progress: bool = True,
    calibration_data: Iterable[dict] | None = None,
) -> PreTrainedModel:
    """Quantize a model without training (the PQ baseline of section 3.2, or intN of section 3.1).

    Args:
        model: a dense model, converted in place; its noise is removed first.
        config: :class:`IPQConfig` or :class:`FixedPointConfig`.
        progress: show progress bars, and the bit allocation for a target size.
        calibration_data: a few batches, each the keyword arguments of a forward. Required if
            ``config.activation_bits`` is set (section 7.7), ``config.importance`` is
            ``"activations"``, or ``config.frequent_rows`` is set (unless the model's noise has
            counted the lookups); also used to measure sensitivities for a target size, and how
            packing changes the statistics of BatchNorm.

    Returns:
        The same object, packed. ``save_pretrained``, ``push_to_hub`` and ``Trainer`` work as usual.

    Raises:
        TypeError: if the model is not a ``PreTrainedModel``, the config has another type, or the
            calibration data is not a list of dicts of tensors.
        ValueError: if the model is already quantized, the config does not fit it, the target cannot
            be met, a weight cannot be stored (NaN, too large), or required calibration data is
            missing or does not reach a layer.

    If it fails or is interrupted, the model is restored, noise included. For this, the dense
    weights stay in memory until it returns, in addition to the packed ones.
    """
    check_can_be_packed(model)
    require_instance(
        "config", config, QuantizedModelConfig, "an IPQConfig or a FixedPointConfig",
        "call e.g. quantize_model(model, IPQConfig(block_size=4))",
    )  # fmt: skip
    require_weights(model)
    batches, required_by = [], data_needed_by(config, model)
    if required_by or config.target or tracking_norms(model):
        batches = read_batches("calibration_data", calibration_data)
    elif calibration_data is not None:
        logger.warning("calibration_data is not used: %s", _why_unused(config, model))
    if not batches:
        warn_without_data(model, "there is no calibration_data; pass a few training batches")
    if required_by:
        require_batches(batches, required_by)

    def measure() -> Statistics:
        run = partial(run_batch, model, field="calibration_data", way_out=_BATCHES)
        return measure_bn_stats(model, batches, run) if batches else {}

    with ModelSnapshot(model):
        fitted = fitted_noise(model)
        lookups = lookups_for(model, config, batches)
        config = with_number_of_rows(remove_noise(model, config), lookups)
        config = resolve_target(model, config, batches, progress, lookups=lookups)
        packer = ModelPacker(model, config, fitted=fitted, lookups=lookups)
        packer.require_runs(batches)
        with bn_stats_of_packed_weights(model, measure):
            packer.pack_all(progress, batches)
        packer.round_leftovers()
        calibrate(model, [layer for _, layer in packed_layers(model)], batches)
    return model
