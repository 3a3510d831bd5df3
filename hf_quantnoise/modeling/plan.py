"""The plan of a compressed model: layer name -> how it is stored, and why the rest is not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..configuration import DENSE, QuantizedModelConfig
from ..quantizers import Quantizer, quantizer_from_dict
from ..structure import GROUPS, LayerInfo, find_layers, select_layers, unsupported_weights

# Why a layer is dense that layer_quantizers says to leave.
BY_NAME = "layer_quantizers leaves it dense"


@dataclass(frozen=True)
class PlannedWeight:
    """One weight to be packed, with every layer that holds it (a tied pair has two)."""

    layers: tuple[LayerInfo, ...]
    quantizer: Quantizer
    activation_bits: int | None = None

    def of(self, model: nn.Module) -> PlannedWeight:
        """The same for another model, whose layers have the same names."""
        layers = (replace(own, module=model.get_submodule(own.name)) for own in self.layers)
        return replace(self, layers=tuple(layers))

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
        ValueError: where a pattern matches no layer, a stage can take none of its layers, or
            ``layer_quantizers`` names a layer or a way to store it that does not exist.
    """
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    _require_known(config, model, layers)
    _require_known_keys(config, model)
    plan: dict[str | None, list[PlannedWeight]] = {stage: [] for stage in config.stage_groups()}
    left: dict[str, str] = {}
    for members in weights_of(layers):
        layer = members[0]
        stage = stage_of(layer, list(plan))
        settings = config.quantizer_settings(layer) if stage is not False else None
        if stage is False:
            reason = f"its group {layer.group!r} is in no stage"
        elif settings is None:
            reason = f"block_size or n_centroids has no entry for it (group {layer.group!r})"
        elif settings["scheme"] == DENSE:
            reason = BY_NAME
        else:
            quantizer, reason = _quantizer_for(members, settings, config.settings_by_name())
            if reason is None:
                plan[stage].append(PlannedWeight(members, quantizer, config.activation_bits))
                continue
        left.update(dict.fromkeys((member.name for member in members), reason))
    return _with_work(config, plan, left, layers), {**left, **unsupported_weights(model)}


def weights_of(layers: Sequence[LayerInfo]) -> list[tuple[LayerInfo, ...]]:
    """The weights of some layers, each as the layers that hold it, in the order of the first."""
    by_name = {layer.name: layer for layer in layers}
    weights, seen = [], set()
    for layer in layers:
        if layer.name not in seen:
            weights.append((layer, *(by_name[name] for name in layer.ties)))
            seen.update((layer.name, *layer.ties))
    return weights


def _quantizer_for(
    members: tuple[LayerInfo, ...], settings: dict[str, Any], by_name: dict[str, dict[str, Any]]
) -> tuple[Quantizer, str | None]:
    """The quantizer of a weight, and why it cannot take it; a layer that the config names raises
    instead, since it was to be stored just so."""
    layer, weight = members[0], members[0].module.weight
    named = next((member.name for member in members if member.name in by_name), None)
    try:
        quantizer = quantizer_from_dict(settings)
    except ValueError as error:
        if named is None:
            raise
        raise ValueError(f"layer_quantizers[{named!r}]: {error}; {DENSE!r} leaves it") from None
    reason = _refusal(layer, quantizer, weight.numel() * weight.element_size())
    if reason is not None and named is not None:
        raise ValueError(
            f"layer_quantizers[{named!r}]: {quantizer.short_name} cannot store it: {reason}; give "
            f'other settings, or {{"scheme": "{DENSE}"}}'
        )
    return quantizer, reason


def _require_known(
    config: QuantizedModelConfig, model: nn.Module, layers: Sequence[LayerInfo]
) -> None:
    """Refuses settings for layers that are not the model's, that the config leaves out, or that
    contradict each other for one weight."""
    by_name, chosen = config.settings_by_name(), {layer.name: layer for layer in layers}
    for name, settings in by_name.items():
        where = f"layer_quantizers[{name!r}]"
        if name not in chosen:
            known = [layer.name for layer in find_layers(model)]
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f" Did you mean {close[0]!r}?" if close else f" It has {', '.join(known[:4])}, ..."
            )
            raise ValueError(
                f"{where}: target_modules and exclude_modules leave this layer out"
                if name in known
                else f"{where}: {type(model).__name__} has no such layer to quantize, after "
                f"prune_layers and share_layers. {hint}"
            )
        layer = chosen[name]
        if settings["scheme"] == DENSE:
            continue
        if stage_of(layer, config.stage_groups()) is False:
            raise ValueError(
                f"{where}: its group {layer.group!r} is in no stage; add it to "
                f"stages={config.stage_groups()!r}, or take the entry out"
            )
    for name, settings in by_name.items():
        for other in chosen[name].ties:
            if by_name.get(other, settings) != settings:
                raise ValueError(
                    f"layer_quantizers: {name} and {other} hold one weight and are to be stored "
                    f"in two ways, {settings} and {by_name[other]}; leave one entry"
                )


def _require_known_keys(config: QuantizedModelConfig, model: nn.Module) -> None:
    """Refuses keys of int-or-dict settings that are no structure group and match no layer."""
    names = [layer.name for layer in find_layers(model)]
    for setting in ("block_size", "n_centroids"):
        value = getattr(config, setting, None)
        for key in value if isinstance(value, dict) else ():
            if key in GROUPS or any(re.fullmatch(key, name) for name in names):
                continue
            close = difflib.get_close_matches(key, [*GROUPS, *names], n=1)
            hint = (
                f". Did you mean {close[0]!r}?"
                if close
                else f"; it has {', '.join(names[:4])}, ..."
            )
            raise ValueError(
                f"{setting}={value!r}: {key!r} is no structure group ({', '.join(GROUPS)}), and as "
                f"a regex for whole names it matches no layer of the model{hint}"
            )


def _with_work(
    config: QuantizedModelConfig,
    plan: dict[str | None, list[PlannedWeight]],
    left: dict[str, str],
    layers: Sequence[LayerInfo],
) -> dict[str | None, list[PlannedWeight]]:
    """The stages that pack something. One that the config names away, layer by layer, has no work;
    one that packs nothing for another reason is refused."""
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
        if all(left[layer.name] == BY_NAME for layer in own):
            continue
        widths = sorted({layer.columns for layer in own})
        tried = config.quantizer_settings(own[0]) or vars(config)
        setting = "block_size" if "block_size" in tried else "bits"
        reasons = "; ".join(f"{layer.name}: {left[layer.name]}" for layer in own[:3])
        raise ValueError(
            f"{setting}={tried[setting]!r}: the stage {stage!r} can quantize none of its "
            f"{len(own)} layers ({reasons}). Their columns number {widths}: choose a block_size "
            "that divides them, fewer n_centroids, or leave the stage out"
        )
    if not any(plan.values()):
        raise ValueError("layer_quantizers leaves every layer dense: nothing is to be quantized")
    return {stage: weights for stage, weights in plan.items() if weights}
