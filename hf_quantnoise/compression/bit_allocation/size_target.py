"""Target sizes: how many bytes a config allows, how large its file is, and whether they agree."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ...configuration import IPQConfig, QuantizedModelConfig
from ...configuration.row_groups import warn_without_row_groups, without_share
from ...modeling.model_copies import copy_on_meta
from ...modeling.packer import ModelPacker
from ...modeling.plan import stage_of, stages_for
from ...modeling.structural_changes import changed_copy
from ...size import size_report
from ...structure import LayerInfo, select_layers, weights_of
from .candidates import candidates_for


def file_bytes(model: PreTrainedModel, config: QuantizedModelConfig) -> int:
    """Return the size in bytes of the ``model.safetensors`` that a config results in.

    Nothing is quantized and the model is not changed.

    Raises:
        ValueError: if the config does not fit the model.
    """
    shapes = copy_on_meta(model)
    ModelPacker(shapes, config).pack_skeletons()
    return size_report(shapes).total.disk_bytes


def target_bytes(model: PreTrainedModel, config: IPQConfig) -> int:
    """Return the number of bytes that a config allows.

    ``target_bits_per_weight`` counts each parameter of the model once, after pruning and sharing.
    """
    if config.target_size_mb is not None:
        return int(config.target_size_mb * 1e6)
    return int(config.target_bits_per_weight * sum(p.numel() for p in model.parameters()) / 8)


def check_plan(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Check that a config fits a dense model, without changing the model or measuring anything.

    Raises:
        ValueError: under the conditions of :func:`hf_quantnoise.quantize_model`.
    """
    warn_without_row_groups(config, model)
    config = without_share(config)
    if config.target is None:
        ModelPacker(model, config).check_weights()
    elif config.settings_by_name():
        check_within_target(model, config)
    else:
        check_target_reachable(model, config)


def check_within_target(model: PreTrainedModel, config: IPQConfig) -> None:
    """Check that the file that ``layer_quantizers`` results in is within the target."""
    target, size = target_bytes(changed_copy(model, config), config), file_bytes(model, config)
    if size > target:
        raise ValueError(
            f"invalid {config.target}: it allows {target:,} bytes, but layer_quantizers results in "
            f"{size:,}; set fewer bits for some layers, or remove layer_quantizers to allocate "
            "again"
        )


def check_target_reachable(model: PreTrainedModel, config: IPQConfig) -> int:
    """Return the number of bytes a target allows, without measuring.

    Raise a ``ValueError`` if no bit allocation is small enough, or the dense model is already.
    """
    shapes = changed_copy(copy_on_meta(model), config)
    target, dense = target_bytes(shapes, config), size_report(shapes).total.disk_bytes
    if dense <= target:
        raise ValueError(
            f"invalid {config.target}: it allows {target:,} bytes, and the file has {dense:,} "
            "without quantization; set a smaller target, or quantize without a target"
        )
    size, stored = _smallest(model, shapes, config)
    if size > target:
        n_weights = sum(p.numel() for p in shapes.parameters())
        raise ValueError(
            f"invalid {config.target}: it allows {target:,} bytes, but the smallest bit allocation "
            f"takes {size:,} ({8 * size / n_weights:.2f} bits per weight); "
            + _ways_to_reduce(shapes, config, size - stored)
        )
    return target


def smallest_bytes(model: PreTrainedModel, config: IPQConfig) -> int:
    """Return the size of the smallest file that bit allocation can reach with a config."""
    return _smallest(model, changed_copy(copy_on_meta(model), config), config)[0]


def _smallest(
    model: PreTrainedModel, shapes: PreTrainedModel, config: IPQConfig
) -> tuple[int, int]:
    """Return the bytes of the smallest file, and those of the weights in its stages.

    ``shapes`` is a pruned and shared copy of the model on the meta device.
    """
    smallest = {}
    for layers in weights_to_store(shapes, config):
        candidates = candidates_for(layers, config, with_errors=False).candidates
        smallest[layers[0].name] = min(candidates, key=lambda each: each.bytes)
    settings = {name: candidate.settings for name, candidate in smallest.items()}
    size = file_bytes(model, replace(config, layer_quantizers=settings))
    return size, sum(each.bytes for each in smallest.values())


def _ways_to_reduce(shapes: nn.Module, config: IPQConfig, rest: int) -> str:
    stages = stages_for(config, shapes)
    layers = (layer for layer in select_layers(shapes) if stage_of(layer, stages) is False)
    missing = sorted({layer.group for layer in layers})
    ways = [f"add {', '.join(missing)} to stages"] if missing else []
    ways += [f"set {name}=8" for name in ("codebook_bits", "leftover_bits")
             if getattr(config, name) > 8]  # fmt: skip
    ways.append("set share_layers or prune_layers")
    return f"{', '.join(ways)} ({rest:,} of the bytes are not of weights in a stage)"


def weights_to_store(model: nn.Module, config: IPQConfig) -> list[tuple[LayerInfo, ...]]:
    """Return the layers that hold each weight of a stage."""
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    stages = stages_for(config, model)
    return [group for group in weights_of(layers) if stage_of(group[0], stages) is not False]
