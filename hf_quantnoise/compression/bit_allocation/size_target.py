"""Target sizes: how many bytes a config allows, how large its file is, and whether they agree."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ...compat import own_parameters
from ...configuration import IPQConfig, QuantizedModelConfig
from ...configuration.row_groups import warn_without_row_groups, without_share
from ...modeling.model_copies import copy_sharing_tensors
from ...modeling.packer import ModelPacker
from ...modeling.plan import stage_of, stages_for
from ...modeling.structural_changes import changed_copy
from ...size import size_report
from ...structure import LayerInfo, select_layers, weights_of
from .candidates import candidates_for


def file_bytes(model: PreTrainedModel, config: QuantizedModelConfig) -> int:
    """Return the size in bytes of the ``model.safetensors`` that a config results in.

    Nothing is quantized and the model is not changed. Values that float16 cannot hold count as they
    are stored, in 32 bits; on the meta device there are none.

    Raises:
        ValueError: if the config does not fit the model.
    """
    copy = copy_sharing_tensors(model)
    packer = ModelPacker(copy, config)
    packer.pack_skeletons()
    # In their own dtype, also if float16 holds their values (zeros) until they are trained.
    empty: dict[int, nn.Parameter] = {}
    for layer in map(copy.get_submodule, packer.excluded):
        for name, tensor in own_parameters(layer).items():
            if tensor is not None:
                own_parameters(layer)[name] = empty.setdefault(
                    id(tensor), nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
                )
    return size_report(copy).total.disk_bytes


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
    copy = changed_copy(model, config)
    target, dense = target_bytes(copy, config), size_report(copy).total.disk_bytes
    if dense <= target:
        raise ValueError(
            f"invalid {config.target}: it allows {target:,} bytes, and the file has {dense:,} "
            "without quantization; set a smaller target, or quantize without a target"
        )
    require_within_target(copy, config, target, *_smallest(model, copy, config))
    return target


def require_within_target(
    copy: PreTrainedModel, config: IPQConfig, target: int, size: int, stored: int
) -> None:
    """Raise a ``ValueError`` if the smallest file is larger than the target.

    ``copy`` is a pruned and shared copy of the model, ``size`` the bytes of the file and ``stored``
    those of the weights in its stages.
    """
    if size > target:
        n_weights = sum(p.numel() for p in copy.parameters())
        raise ValueError(
            f"invalid {config.target}: it allows {target:,} bytes, but the smallest bit allocation "
            f"takes {size:,} ({8 * size / n_weights:.2f} bits per weight); "
            + _ways_to_reduce(copy, config, size - stored)
        )


def smallest_bytes(model: PreTrainedModel, config: IPQConfig) -> int:
    """Return the size of the smallest file that bit allocation can reach with a config."""
    return _smallest(model, changed_copy(model, config), config)[0]


def _smallest(model: PreTrainedModel, copy: PreTrainedModel, config: IPQConfig) -> tuple[int, int]:
    """Return the bytes of the smallest file, and those of the weights in its stages.

    ``copy`` is a pruned and shared copy of the model.
    """
    smallest = {}
    for layers in weights_to_store(copy, config):
        candidates = candidates_for(layers, config, with_errors=False).candidates
        smallest[layers[0].name] = min(candidates, key=lambda each: each.bytes)
    settings = {name: candidate.settings for name, candidate in smallest.items()}
    size = file_bytes(model, replace(config, layer_quantizers=settings))
    return size, sum(each.bytes for each in smallest.values())


def _ways_to_reduce(copy: nn.Module, config: IPQConfig, rest: int) -> str:
    stages = stages_for(config, copy)
    layers = (layer for layer in select_layers(copy) if stage_of(layer, stages) is False)
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
