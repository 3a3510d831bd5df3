"""Apply noise to a model and remove it, without changing parameters."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers.utils import logging

from ..argument_checks import describe, require_instance, require_model
from ..configuration import NOISES, QuantNoiseConfig
from ..lookups import Lookups, with_number_of_rows
from ..quantizers import RowGroupQuantizer, quantizer_from_dict
from ..sharing import LayerSharing, chunks_of
from ..structure import (
    LayerInfo,
    block_size_of,
    entry_for,
    find_layers,
    select_layers,
    unsupported_weights,
    weights_of,
)
from .functions import BlockNoise, NoiseFunction
from .layerdrop import LayerDrop, droppable_chunks, make_droppable, make_undroppable
from .layers import LayerNoise, is_noisy, make_noisy, remove_noise
from .operator import WeightNoise
from .squeeze_excitation import squeeze_excitation_layers
from .state import NoisedWeight, QuantNoiseState, attach, detach, find_state, find_states

logger = logging.get_logger(__name__)

Reasons = dict[str, str]  # layer name -> why it gets no noise

_SIDE_TABLE = (
    "a table other than the input embeddings (position, type): zeroed rows can make an all-zero "
    "vector before a LayerNorm; name it in target_modules to apply noise to it"
)
_UNKNOWN_TABLE = (
    "the model does not define which table holds its input embeddings (get_input_embeddings), "
    "and zeroed rows of others can make an all-zero vector before a LayerNorm; name it in "
    "target_modules, with the other layers, to apply noise to it"
)

_SQUEEZE_EXCITATION = (
    "a layer of a squeeze-and-excitation block, which scales each channel (section 7.8); "
    "name it in target_modules to apply noise to it"
)


def apply_quant_noise(
    model: nn.Module, qn_config: QuantNoiseConfig, lookups: Lookups | None = None
) -> nn.Module:
    """Apply quantization noise to a model (section 4), in place.

    Layers stay the same objects with the same parameters and ``state_dict`` keys, and
    ``isinstance`` checks hold. They are noisy in training mode. Codebooks and scales are fitted at
    once. ``hf_quantnoise.noise.find_state(model)`` returns them, the rates, and why layers were
    skipped.

    In a distributed run all ranks must call it; they get the codebooks of rank 0.

    Args:
        model: any model; :func:`remove_quant_noise` removes the noise again.
        qn_config: which noise to apply, at which rate and to which layers.
        lookups: :func:`count_lookups`, if ``qn_config.frequent_rows`` is set.

    Returns:
        The same object.

    Raises:
        TypeError: if the model is not a module, or ``qn_config`` not a QuantNoiseConfig.
        ValueError: if the model already has noise, is fully quantized, or has no layer that can
            get the noise, or ``lookups`` is missing; the model is then unchanged.
    """
    require_model(model, nn.Module)
    require_instance(
        "qn_config", qn_config, QuantNoiseConfig, "a QuantNoiseConfig",
        "call e.g. apply_quant_noise(model, QuantNoiseConfig(noise='proxy', p=0.1))",
    )  # fmt: skip
    if find_state(model) is not None or any(map(is_noisy, model.modules())):
        raise ValueError(
            "the model has quantization noise already; call remove_quant_noise(model) first, or "
            "set find_state(model).p to change the rate"
        )
    if getattr(model, "is_quantized", False) and not find_layers(model):
        raise ValueError(
            f"{type(model).__name__} is quantized already and has no dense layer for noise; apply "
            "noise before quantization (model.dequantize() gives a dense model)"
        )
    if qn_config.counts_lookups and lookups is None:
        raise ValueError(
            f"frequent_rows={qn_config.frequent_rows!r} requires the number of lookups of each row "
            "in the training data; pass lookups=count_lookups(model, batches)"
        )
    sharing = LayerSharing(model, chunks_of(model, qn_config.share_layers))
    try:
        state = _fitted_state(model, qn_config, sharing, lookups or {})
    except BaseException:  # also an interrupt
        sharing.undo()
        raise
    sharing.release()
    for weight in state.weights:
        for member, (name, module) in enumerate(zip(weight.names, weight.modules, strict=True)):
            make_noisy(module, LayerNoise(weight.noise, member, state.activations.get(name)))
    if state.layerdrop is not None:
        make_droppable(model, state.layerdrop)
    attach(model, state)
    return model


def _fitted_state(
    model: nn.Module, qn_config: QuantNoiseConfig, sharing: LayerSharing, lookups: Lookups
) -> QuantNoiseState:
    """Return the state of a model whose layers share already, codebooks and scales fitted."""
    qn_config = with_number_of_rows(qn_config, lookups)
    layers = select_layers(model, qn_config.target_modules, qn_config.exclude_modules)
    weights, refused, by_default = _plan(model, layers, qn_config, lookups)
    if not weights:
        raise ValueError(_no_layer_message(layers, qn_config, {**by_default, **refused}))
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        logger.warning_once(f"quantization noise skips {len(refused)} layers ({reasons})")
    if unknown := [name for name, reason in by_default.items() if reason == _UNKNOWN_TABLE]:
        tables, names = "table" if len(unknown) == 1 else "tables", ", ".join(unknown)
        logger.warning_once(
            f"quantization noise skips {len(unknown)} {tables} ({names}): {_UNKNOWN_TABLE}"
        )
    drop = None
    if qn_config.layerdrop > 0:
        chunks = droppable_chunks(model, sharing.chunks, qn_config.layerdrop)
        drop = LayerDrop(qn_config.layerdrop, qn_config.layerdrop_ste, chunks)
    skipped = {**by_default, **refused, **unsupported_weights(model)}
    state = QuantNoiseState(qn_config, weights, skipped, sharing, drop, lookups)
    state.refresh_codebooks()
    state.refresh_scales()
    return state


def noised_layers(model: nn.Module, qn_config: QuantNoiseConfig) -> list[str]:
    """Return the names of the layers that :func:`apply_quant_noise` would apply noise to."""
    layers = select_layers(model, qn_config.target_modules, qn_config.exclude_modules)
    return [name for weight in _plan(model, layers, qn_config)[0] for name in weight.names]


def remove_quant_noise(model: nn.Module) -> nn.Module:
    """Remove the noise from a model, in place.

    Layers get their original classes; layers that shared weights get a copy each. A model without
    noise is returned unchanged.

    Raises:
        TypeError: if the model is not a module.
    """
    require_model(model, nn.Module)
    for state in find_states(model):  # several, if parts of the model got noise one by one
        state.sharing.undo()
    for module in model.modules():
        if is_noisy(module):
            remove_noise(module)
    make_undroppable(model)
    detach(model)
    return model


def _plan(
    model: nn.Module,
    layers: list[LayerInfo],
    config: QuantNoiseConfig,
    lookups: Lookups | None = None,
) -> tuple[list[NoisedWeight], Reasons, Reasons]:
    """Return the noised weights, the refused layers, and those skipped by default.

    Without ``lookups`` weights in groups of rows cannot be fitted.
    """
    weights: list[NoisedWeight] = []
    refused: Reasons = {}
    by_default: Reasons = {}
    rates = [rate for _, rate in config.noises]
    by_form = config.target_modules is None
    zeroes = by_form and any(NOISES[name].zeroes for name, _ in config.noises)
    gates = squeeze_excitation_layers(model, find_layers(model)) if by_form else set()
    knows_inputs = any(hasattr(module, "get_input_embeddings") for module in model.modules())
    side_table = _SIDE_TABLE if knows_inputs else _UNKNOWN_TABLE
    for members in weights_of(layers):
        layer, names = members[0], tuple(member.name for member in members)
        tables = [m for m in members if isinstance(m.module, nn.Embedding)]
        if zeroes and not all(table.input_table for table in tables):
            by_default.update(dict.fromkeys(names, side_table))
            continue
        if not gates.isdisjoint(names):
            by_default.update(dict.fromkeys(names, _SQUEEZE_EXCITATION))
            continue
        reason = next(filter(None, map(_cannot_be_noised, members)), None)
        functions, reasons = ([], [reason]) if reason else _functions_for(layer, config, lookups)
        if reasons:
            refused.update(dict.fromkeys(names, "; ".join(reasons)))
        if functions:
            noise = WeightNoise(functions, rates, layer.rows, layer.columns, len(members))
            weights.append(NoisedWeight(names, tuple(m.module for m in members), noise))
    return weights, refused, by_default


def _cannot_be_noised(layer: LayerInfo) -> str | None:
    """Return why noise would have no effect on a layer, or None."""
    module: Any = layer.module
    if not module.weight.is_floating_point():
        return f"its weight is stored as {module.weight.dtype}"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling the layer"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (for example by accelerate's dispatch)"
    return None


def _functions_for(
    layer: LayerInfo, config: QuantNoiseConfig, lookups: Lookups | None
) -> tuple[list[tuple[int, NoiseFunction]], list[str]]:
    """Return the noises of the config that a layer can get, and why it cannot get the others."""
    functions, reasons = [], []
    for index, (name, _) in enumerate(config.noises):
        cls = NOISES[name]
        sizes: dict[str, int | None] = {"block_size": 1, "n_centroids": 1}
        if cls.reads_block_size:
            sizes["block_size"] = block_size_of(config.block_size, layer)
            sizes["n_centroids"] = entry_for(config.n_centroids, layer)
        if missing := [key for key, size in sizes.items() if size is None]:
            fields = " and ".join(missing)
            reasons.append(f"{fields} has no entry for its group {layer.group!r}")
            continue
        function = cls(name, config, **sizes)
        if isinstance(function, BlockNoise):
            _divide_rows(function, layer, config, lookups)
        if reason := function.check(layer.rows, layer.columns):
            reasons.append(f"{name} noise: {reason}" if len(config.noises) > 1 else reason)
        else:
            functions.append((index, function))
    return functions, reasons


def _divide_rows(
    function: BlockNoise, layer: LayerInfo, config: QuantNoiseConfig, lookups: Lookups | None
) -> None:
    """Give a noise on a table groups of rows, if the config has them."""
    quantizer = quantizer_from_dict(config.in_row_groups(function.quantizer.to_dict(), layer))
    if not isinstance(quantizer, RowGroupQuantizer):
        return
    counts = None if lookups is None else lookups.get(layer.name)
    if lookups is not None and (counts is None or counts.shape != (layer.rows,)):
        raise ValueError(
            f"invalid lookups: got {describe(counts)} for {layer.name}, expected the number of "
            f"lookups of each of its {layer.rows} rows; pass count_lookups(model, batches)"
        )
    function.divide_rows(quantizer, counts)


def _no_layer_message(layers: list[LayerInfo], config: QuantNoiseConfig, skipped: Reasons) -> str:
    """Return the error message if no layer can get the noise."""
    if all(skipped.get(layer.name) == _UNKNOWN_TABLE for layer in layers):
        return f"target_modules={config.target_modules!r} selects only tables; {_UNKNOWN_TABLE}"
    layers = [
        layer for layer in layers if skipped.get(layer.name) not in (_SIDE_TABLE, _UNKNOWN_TABLE)
    ]
    if not layers:
        return (
            f"target_modules={config.target_modules!r} selects only tables other than the input "
            "embeddings, which get no noise by default; name them in target_modules"
        )
    sizes = [(layer.columns, block_size_of(config.block_size, layer)) for layer in layers]
    if all(size and columns % size for columns, size in sizes):
        widths = sorted({columns for columns, _ in sizes})
        common = math.gcd(*widths)
        valid = [size for size in range(2, min(common, 64) + 1) if common % size == 0] or [1]
        return (
            f"block_size={config.block_size!r} does not divide the columns of any layer "
            f"({', '.join(map(str, widths))}); use one of {', '.join(map(str, valid))}"
        )
    first = "; ".join(f"{layer.name}: {skipped[layer.name]}" for layer in layers[:3])
    return f"noise={config.noise!r} fits none of the {len(layers)} layers ({first})"
