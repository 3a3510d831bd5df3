"""The plan of a compressed model: how each layer is stored, and why the others are skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.utils import logging

from ..blocks import weight_matrix
from ..configuration import (
    DENSE,
    IPQConfig,
    QuantizedModelConfig,
    quantizer_from_dict,
    settings_of,
)
from ..configuration.layer_storage import SKIPPED_BY_CONFIG, storage_of, why_not_packed
from ..configuration.row_groups import warn_without_row_groups
from ..patterns import compile_pattern
from ..quantizers import FixedPointQuantizer, Quantizer
from ..quantizers.base import require_finite
from ..structure import (
    GROUPS,
    LayerInfo,
    find_layers,
    select_layers,
    stage_of,
    unsupported_weights,
    weights_of,
)
from .plan_errors import hint, matches_no_layer, nothing_fits

logger = logging.get_logger(__name__)

# How leftover_bits=8 stores a layer that no stage packs.
LEFTOVER = FixedPointQuantizer(bits=8, observer="channel", trained=False)
# Bytes of a tensor's entry in the header of the file, without its name.
HEADER_ENTRY = 72


@dataclass(frozen=True)
class PlannedWeight:
    """A weight to be packed, with every layer that holds it (two for a tied pair)."""

    layers: tuple[LayerInfo, ...]
    quantizer: Quantizer
    activation_bits: int | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """The layers themselves."""
        return [layer.module for layer in self.layers]

    def of(self, model: nn.Module) -> PlannedWeight:
        """Return the same for another model with layers of the same names."""
        layers = (replace(layer, module=model.get_submodule(layer.name)) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def check_values(self) -> None:
        """Raise ValueError, naming the layer, if the weight's values cannot be quantized."""
        first = self.layers[0]
        weight = first.module.weight.detach()
        if weight.is_meta:  # only sizes are asked for
            return
        require_finite(weight, f"{first.name}.weight")
        first.layer_type.require_inverse(weight)
        if reason := self.quantizer.check_values(weight_matrix(first.module)):
            raise ValueError(
                f"invalid {first.name}.weight: {reason}, or exclude the layer "
                f"(exclude_modules=[{first.name!r}])"
            )

    def for_values(self) -> PlannedWeight:
        """Return the same with centroids that can hold the weight's values."""
        module: Any = self.layers[0].module
        if module.weight.is_meta:
            return self
        return replace(self, quantizer=self.quantizer.for_values(weight_matrix(module)))

    def recorded_in(self, plan: Mapping[str, dict[str, Any]]) -> PlannedWeight:
        """Return the same with the quantizer of its entry in a plan, if it has one."""
        if (entry := plan.get(self.layers[0].name)) is None:
            return self
        return replace(self, quantizer=quantizer_from_dict(settings_of(entry)))

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return the entries of the plan in JSON form, one per layer."""
        first = self.layers[0].name
        entries = {}
        for layer in self.layers:
            sizes = {"group": layer.group, "rows": layer.rows, "columns": layer.columns}
            entries[layer.name] = {**sizes, **self.quantizer.to_dict()}
            if self.activation_bits is not None:
                entries[layer.name]["activation_bits"] = self.activation_bits
            if layer.name != first:
                entries[layer.name]["tied_to"] = first
        return entries


def checked_weights(weights: Sequence[PlannedWeight]) -> list[PlannedWeight]:
    """Return weights with centroids that can hold their values; log those that need 32 bits.

    Raises:
        ValueError: naming the layer, if the values of one cannot be quantized.
    """
    checked = [planned.for_values() for planned in weights]
    for planned in checked:
        planned.check_values()
    changed = [
        new.layers[0].name
        for new, old in zip(checked, weights, strict=True)
        if new.quantizer != old.quantizer
    ]
    if changed:
        logger.warning_once(
            f"the centroids of {len(changed)} weights are stored in 32 bits, since float16 cannot "
            f"hold their values: {', '.join(changed)}"
        )
    return checked


def stages_for(config: QuantizedModelConfig, model: nn.Module) -> list[str | None]:
    """Return the stages of a config for a model, also those that turn out to pack nothing."""
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    return config.stage_groups({layer.group for layer in layers})


def make_plan(
    model: nn.Module, config: QuantizedModelConfig
) -> tuple[dict[str | None, list[PlannedWeight]], list[PlannedWeight], dict[str, str]]:
    """Plan how and in which stage each weight is packed, before anything is packed.

    Returns a dict from stage to its weights, bottom-up; the weights of no stage that are packed
    after the last one (``leftover_bits``); and a dict from the name of each layer (or bare
    parameter) that no stage packs to the reason.
    """
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    stages = config.stage_groups({layer.group for layer in layers})
    _require_known(config, model, layers, stages)
    _require_known_keys(config, model)
    if isinstance(config, IPQConfig):  # a convolution or head may stay dense
        config.check_covers([stage for stage in stages if stage not in ("conv", "head")])
        warn_without_row_groups(config, model)
    plan: dict[str | None, list[PlannedWeight]] = {stage: [] for stage in stages}
    leftovers: list[PlannedWeight] = []
    skipped: dict[str, str] = {}
    for members in weights_of(layers):
        layer = members[0]
        quantizer, reason = storage_of(config, members, stages)
        if reason is None:
            weight = PlannedWeight(members, quantizer, config.activation_bits)
            plan[stage_of(layer, stages)].append(weight)
            continue
        if _stores_leftovers(config, layer, reason) and _is_leftover(members):
            leftovers.append(PlannedWeight(members, LEFTOVER))
        skipped.update(dict.fromkeys((member.name for member in members), reason))
    plan = _without_empty_stages(config, plan, skipped, layers)
    for name in (layer.name for planned in leftovers for layer in planned.layers):
        skipped[name] += f"; stored as {LEFTOVER.short_name}"
    return plan, leftovers, {**skipped, **unsupported_weights(model)}


def _stores_leftovers(config: QuantizedModelConfig, layer: LayerInfo, reason: str | None) -> bool:
    """Return whether a config stores a weight that no stage packs as ``LEFTOVER``.

    An entry of another model's plan may name it, too.
    """
    if config.leftover_bits == 8:
        return reason != SKIPPED_BY_CONFIG
    by_name = config.settings_by_name()
    return any(by_name.get(name) == LEFTOVER.to_dict() for name in (layer.name, *layer.ties))


def _is_leftover(members: tuple[LayerInfo, ...]) -> bool:
    """Return whether a weight can be stored as ``LEFTOVER`` and takes less than in float16."""
    header = len(LEFTOVER.state_spec(1, 1)) * (HEADER_ENTRY + len(members[0].name))
    return why_not_packed(members[0], LEFTOVER, 2 * members[0].numel - header) is None


def _require_known(
    config: QuantizedModelConfig,
    model: nn.Module,
    layers: Sequence[LayerInfo],
    stages: Sequence[str | None],
) -> None:
    """Raise if settings are for unknown or excluded layers, or differ between tied layers."""
    by_name, chosen = config.settings_by_name(), {layer.name: layer for layer in layers}
    for name, settings in by_name.items():
        field = f"invalid layer_quantizers[{name!r}]"
        if name not in chosen:
            known = [layer.name for layer in find_layers(model)]
            if name in known:
                raise ValueError(
                    f"{field}: target_modules and exclude_modules exclude this layer; remove one"
                )
            raise ValueError(
                f"{field}: {type(model).__name__} has no such layer after prune_layers and "
                f"share_layers{hint(name, known)}"
            )
        layer = chosen[name]
        of_stage = settings["scheme"] != DENSE and settings != LEFTOVER.to_dict()
        if of_stage and stage_of(layer, stages) is False:
            raise ValueError(
                f"{field}: its group {layer.group!r} is in no stage; add it to stages={stages!r}, "
                "or remove the entry"
            )
        for other in layer.ties:
            if by_name.get(other, settings) != settings:
                raise ValueError(
                    f"invalid layer_quantizers: {name} and {other} are tied but have different "
                    f"settings, {settings} and {by_name[other]}; remove one of the entries"
                )


def _require_known_keys(config: QuantizedModelConfig, model: nn.Module) -> None:
    """Raise if a key of an int-or-dict setting is neither a structure group nor matches a layer."""
    names = [layer.name for layer in find_layers(model)]
    for setting in ("block_size", "n_centroids"):
        value = getattr(config, setting, None)
        for key in value if isinstance(value, dict) else ():
            if key not in GROUPS and not any(map(compile_pattern(setting, key).fullmatch, names)):
                raise ValueError(
                    f"invalid {setting}={value!r}: {key!r} is not a structure group "
                    f"({', '.join(GROUPS)}), and no full layer name matches it as a regex"
                    f"{hint(key, [*GROUPS, *names])}"
                )


def _without_empty_stages(
    config: QuantizedModelConfig,
    plan: dict[str | None, list[PlannedWeight]],
    skipped: dict[str, str],
    layers: Sequence[LayerInfo],
) -> dict[str | None, list[PlannedWeight]]:
    """Return the stages that pack something.

    A stage that the config names may be empty only by ``layer_quantizers``, default ones always.
    """
    stages = list(plan)
    for stage in [] if config.has_default_stages else stages:
        members = [layer for layer in layers if stage_of(layer, stages) == stage]
        if not members:
            raise matches_no_layer(stage, stages, layers)
        if not plan[stage] and not _are_skipped_by_config(members, skipped):
            raise nothing_fits(config, f"the stage {stage!r}", members, skipped)
    if not any(plan.values()):
        members = [layer for layer in layers if stage_of(layer, stages) is not False]
        if not members:
            groups = sorted({layer.group for layer in layers})
            raise ValueError(
                f"invalid stages={stages!r}: the default stages contain none of the "
                f"{len(layers)} layers ({', '.join([layer.name for layer in layers][:3])}), whose "
                f"groups are {groups}; name them, e.g. stages={groups!r}"
            )
        if _are_skipped_by_config(members, skipped):
            raise ValueError("layer_quantizers skips every layer, so there is nothing to quantize")
        raise nothing_fits(config, "the model", members, skipped)
    return {stage: weights for stage, weights in plan.items() if weights}


def _are_skipped_by_config(members: Sequence[LayerInfo], skipped: dict[str, str]) -> bool:
    return all(skipped[layer.name] == SKIPPED_BY_CONFIG for layer in members)
