"""The plan of a compressed model: layer name -> how it is stored, and why the rest is not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..configuration import QuantizedModelConfig
from ..quantizers import Quantizer, quantizer_from_dict
from ..structure import GROUPS, LayerInfo, other_weights, select_layers


@dataclass(frozen=True)
class PlannedWeight:
    """One weight to be packed, with every layer that holds it (a tied pair has two)."""

    layers: tuple[LayerInfo, ...]
    quantizer: Quantizer
    activation_bits: int | None = None

    def entries(self) -> dict[str, dict[str, Any]]:
        """The plan's entries in their JSON form, one for each layer."""
        first = self.layers[0].name
        entries = {}
        for layer in self.layers:
            entries[layer.name] = {
                "group": layer.group,
                "rows": layer.rows,
                "columns": layer.columns,
                **self.quantizer.to_dict(),
            }
            if self.activation_bits is not None:
                entries[layer.name]["activation_bits"] = self.activation_bits
            if layer.name != first:
                entries[layer.name]["tied_to"] = first
        return entries


def stage_of(layer: LayerInfo, stages: Sequence[str | None]) -> str | None | bool:
    """The stage that takes a layer (a regex wins over a group), or False where none does."""
    for stage in stages:
        if stage is not None and stage not in GROUPS and re.fullmatch(stage, layer.name):
            return stage
    if layer.group in stages:
        return layer.group
    return None if None in stages else False


def _refusal(layer: LayerInfo, quantizer: Quantizer, dense_bytes: int) -> str | None:
    if reason := quantizer.check(layer.rows, layer.columns):
        return reason
    packed = quantizer.packed_bytes(layer.rows, layer.columns)
    if packed >= dense_bytes:
        return f"packed it would take {packed} bytes, dense it takes {dense_bytes}"
    return None


def make_plan(
    model: nn.Module, config: QuantizedModelConfig
) -> tuple[dict[str | None, list[PlannedWeight]], dict[str, str]]:
    """Which weight is packed how, in which stage; read off the model before anything is packed.

    Returns:
        A dict from stage to the weights it packs, bottom-up; and a dict from the name of each
        layer (or bare parameter) that stays in floating point to the reason.

    Raises:
        ValueError: where a pattern matches no layer, or a stage can take none of its layers.
    """
    stages = config.stage_groups()
    plan: dict[str | None, list[PlannedWeight]] = {stage: [] for stage in stages}
    left: dict[str, str] = {}
    layers = {
        layer.name: layer
        for layer in select_layers(model, config.target_modules, config.exclude_modules)
    }
    seen: set[str] = set()
    for layer in layers.values():
        if layer.name in seen:
            continue
        members = (layer, *(layers[name] for name in layer.ties))
        seen.update(member.name for member in members)
        stage = stage_of(layer, stages)
        settings = config.quantizer_settings(layer) if stage is not False else None
        if stage is False:
            reason = f"its group {layer.group!r} is in no stage"
        elif settings is None:
            reason = f"block_size or n_centroids has no entry for it (group {layer.group!r})"
        else:
            quantizer = quantizer_from_dict(settings)
            weight = layer.module.weight
            reason = _refusal(layer, quantizer, weight.numel() * weight.element_size())
            if reason is None:
                plan[stage].append(PlannedWeight(members, quantizer, config.activation_bits))
                continue
        left.update(dict.fromkeys((member.name for member in members), reason))
    _require_work(config, plan, left, list(layers.values()))
    return plan, {**left, **other_weights(model)}


def _require_work(config, plan, left, layers: Sequence[LayerInfo]) -> None:
    stages = list(plan)
    for stage in stages:
        if plan[stage]:
            continue
        own = [layer for layer in layers if stage_of(layer, stages) == stage]
        if not own:
            groups = sorted({layer.group for layer in layers})
            raise ValueError(
                f"stages: {stage!r} holds no layer of the model; its groups are {groups}"
            )
        widths = sorted({layer.columns for layer in own})
        tried = config.quantizer_settings(own[0]) or {}
        reasons = "; ".join(f"{layer.name}: {left[layer.name]}" for layer in own[:3])
        raise ValueError(
            f"block_size={tried.get('block_size')}: the stage {stage!r} can quantize none of its "
            f"{len(own)} layers ({reasons}). Their columns number {widths}: choose a block_size "
            "that divides them, fewer n_centroids, or leave the stage out"
        )
