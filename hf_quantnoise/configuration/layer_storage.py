"""Which quantizer a config stores a layer with, or why no stage packs the layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..structure import LayerInfo, find_layers, select_layers, stage_of, weights_of
from .checks import patterns
from .entries import quantizer_from_dict
from .layer_quantizers import DENSE
from .row_groups import without_share

if TYPE_CHECKING:
    from .storage import QuantizedModelConfig

# The reason of layers that a config skips by name.
SKIPPED_BY_CONFIG = "layer_quantizers skips it"
SELECTION = ("target_modules", "exclude_modules")  # which layers a config is for
# Of weights that can be packed; states have the dtype of the weight.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def storage_of(
    config: QuantizedModelConfig, members: Sequence[LayerInfo], stages: Sequence[str | None]
) -> tuple[Any, str | None]:
    """Return the quantizer of a weight, and why no stage packs the weight (None if one does).

    ``members`` are the layers that hold it. The quantizer is None if the config has none for it.

    Raises:
        ValueError: if the config has the layer by name, with a quantizer that does not fit.
    """
    layer = members[0]
    if stage_of(layer, stages) is False:
        return None, f"its group {layer.group!r} is in no stage"
    settings = config.quantizer_settings(layer)
    if settings is None:
        return None, f"block_size or n_centroids has no entry for it (group {layer.group!r})"
    if settings["scheme"] == DENSE:
        return None, SKIPPED_BY_CONFIG
    return _quantizer_for(members, settings, config.settings_by_name())


def stored_layers(
    config: QuantizedModelConfig, model: nn.Module
) -> tuple[dict[str, Any], list[str]]:
    """Return the quantizer of each layer that a stage packs, and which other layers are targeted.

    A share of the lookups as ``frequent_rows``, which needs data, counts as one group of rows.
    """
    config = without_share(config)
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    stages = config.stage_groups({layer.group for layer in layers})
    packed: dict[str, Any] = {}
    for members in weights_of(layers):
        quantizer, reason = storage_of(config, members, stages)
        if reason is None:
            packed |= dict.fromkeys((layer.name for layer in members), quantizer)
    names = [layer.name for layer in select_layers(model, config.target_modules)]
    return packed, [name for name in names if name not in packed]


def noise_fields(
    model: nn.Module | None, storage: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """Return the fields of noise: those of a storage, replaced by one's own.

    With a model, an own selection is one among the layers that the storage selects.
    """
    fields, selection = {**storage, **own}, {name: own.get(name) for name in SELECTION}
    if model is None or not any(selection.values()):
        return fields
    for name, value in selection.items():
        if value is not None:
            patterns(name, value)
    both = [
        {layer.name for layer in select_layers(model, *(each[name] for name in SELECTION))}
        for each in (storage, selection)
    ]
    others = [layer.name for layer in find_layers(model) if layer.name not in both[0] & both[1]]
    return {**fields, "exclude_modules": "|".join(map(re.escape, others)) or None}


def _quantizer_for(
    members: Sequence[LayerInfo], settings: dict[str, Any], by_name: dict[str, dict[str, Any]]
) -> tuple[Any, str | None]:
    layer, weight = members[0], members[0].module.weight
    named = next((member.name for member in members if member.name in by_name), None)
    try:
        quantizer = quantizer_from_dict(settings)
    except ValueError as error:
        if named is None:
            raise
        raise ValueError(
            f"invalid layer_quantizers[{named!r}]: {error}; to skip the layer use {DENSE!r}"
        ) from None
    reason = why_not_packed(layer, quantizer, weight.numel() * weight.element_size())
    if reason is not None and named is not None:
        raise ValueError(
            f"invalid layer_quantizers[{named!r}]: {quantizer.short_name} does not fit: {reason}; "
            f'use other settings, or {{"scheme": "{DENSE}"}} to skip it'
        )
    return quantizer, reason


def why_not_packed(layer: LayerInfo, quantizer: Any, dense_bytes: int) -> str | None:
    """Return why a layer cannot be stored with a quantizer, or None if it can."""
    if (dtype := layer.module.weight.dtype) not in DTYPES:
        return f"its weight is stored as {dtype}"
    if layer.layer_type.packed_forward is None:
        return f"layers of type {layer.layer_type.layer_class.__name__} cannot be packed"
    if reason := quantizer.check(layer.rows, layer.columns):
        return reason
    if (packed := quantizer.packed_bytes(layer.rows, layer.columns)) >= dense_bytes:
        return f"it would take {packed} bytes packed and takes {dense_bytes} dense"
    return None
