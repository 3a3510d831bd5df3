"""A size on disk: what a config allows, what its file takes, and whether any allotment will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ...configuration import IPQConfig, QuantizedModelConfig
from ...modeling.model_copies import copy_on_meta
from ...modeling.packer import ModelPacker
from ...modeling.plan import stage_of, weights_of
from ...modeling.structural_changes import changed_copy
from ...size import size_report
from ...structure import LayerInfo, select_layers
from .candidates import WeightChoices, choices_for


def file_bytes(model: PreTrainedModel, config: QuantizedModelConfig) -> int:
    """Size of the ``model.safetensors`` that a config makes of a dense model, in bytes. Nothing is
    quantized, and the model is left as it is.

    Raises:
        ValueError: if the config cannot be carried out.
    """
    shapes = copy_on_meta(model)
    ModelPacker(shapes, config).pack_skeletons()
    return size_report(shapes).total.disk_bytes


def target_bytes(model: PreTrainedModel, config: IPQConfig) -> int:
    """The bytes a config allows. ``target_bits_per_weight`` counts each parameter of what is left
    after pruning and sharing once.

    Args:
        model: the model as it will be packed.
        config: with a target.
    """
    if config.target_size_mb is not None:
        return int(config.target_size_mb * 1e6)
    return int(config.target_bits_per_weight * sum(p.numel() for p in model.parameters()) / 8)


def check_plan(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Whether a config can be carried out on a dense model, which is left as it is; its target too,
    as far as that can be told without measuring.

    Raises:
        ValueError: as ``quantize_model`` would.
    """
    if config.target is None:
        ModelPacker(model, config)
    elif config.settings_by_name():
        check_within_target(model, config)
    else:
        check_target_can_be_met(model, config)


def check_within_target(model: PreTrainedModel, config: IPQConfig) -> None:
    """Whether ``layer_quantizers`` makes a file within the target.

    Raises:
        ValueError: with both sizes, if it does not; or if it cannot be carried out.
    """
    target, size = target_bytes(changed_copy(model, config), config), file_bytes(model, config)
    if size > target:
        raise ValueError(
            f"{config.target} allows {target:,} bytes and layer_quantizers makes a file of "
            f"{size:,}; give some layers fewer bits, or empty layer_quantizers to allocate again"
        )


def check_target_can_be_met(model: PreTrainedModel, config: IPQConfig) -> int:
    """The bytes a target allows, after a look at whether any allotment fits; nothing is measured.

    Raises:
        ValueError: if the smallest allotment is larger, with its size and what would lower it; or
            if the model is as small as that already.
    """
    shapes = changed_copy(copy_on_meta(model), config)
    target, dense = target_bytes(shapes, config), size_report(shapes).total.disk_bytes
    if dense <= target:
        raise ValueError(
            f"{config.target} allows {target:,} bytes, and without quantization the file has "
            f"{dense:,}; give a smaller target, or quantize without one"
        )
    weights = [
        choices_for(own, config, with_errors=False) for own in weights_to_store(shapes, config)
    ]
    sizes = [own.candidates for own in weights]
    least = [min(range(len(own)), key=lambda n, own=own: own[n].bytes) for own in sizes]
    size = file_bytes(model, with_choices(config, weights, least))
    if size > target:
        of_weights = sum(p.numel() for p in shapes.parameters())
        raise ValueError(
            f"{config.target} allows {target:,} bytes, and the smallest allotment takes {size:,} "
            f"({size / 1e6:.3f} MB, {8 * size / of_weights:.3f} bits per weight). "
            + _what_would_lower_it(shapes, config)
        )
    return target


def _what_would_lower_it(shapes: nn.Module, config: IPQConfig) -> str:
    chosen = {id(own[0].module.weight) for own in weights_to_store(shapes, config)}
    rest = sum(p.numel() * p.element_size() for p in shapes.parameters() if id(p) not in chosen)
    groups = {layer.group for layer in select_layers(shapes)}
    missing = sorted(group for group in groups if group not in config.stage_groups())
    ways = [f"{rest / 1e6:.3f} MB of it are weights that no stage quantizes"]
    if missing:
        ways.append(f"stages may also have {', '.join(missing)}")
    if config.codebook_bits == 32:
        ways.append("codebook_bits=16 or 8 halves or quarters the codebooks")
    ways.append("share_layers and prune_layers leave fewer weights")
    return "; ".join(ways)


def weights_to_store(model: nn.Module, config: IPQConfig) -> list[tuple[LayerInfo, ...]]:
    """The weights that a stage takes, each as the layers that hold it."""
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    stages = config.stage_groups()
    return [own for own in weights_of(layers) if stage_of(own[0], stages) is not False]


def with_choices(
    config: IPQConfig, weights: Sequence[WeightChoices], chosen: Sequence[int]
) -> IPQConfig:
    """The config with one candidate of each weight, by its place among them."""
    settings = {
        choices.name: choices.candidates[place].settings
        for choices, place in zip(weights, chosen, strict=True)
    }
    return replace(config, layer_quantizers=settings)
