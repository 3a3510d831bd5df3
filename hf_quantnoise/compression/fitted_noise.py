"""Codebooks and codes of the noise of a model, handed to the compression run that follows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from ..configuration.row_groups import why_no_row_groups
from ..hub.card import DENSE, LATENT
from ..lookups import Lookups, count_lookups
from ..modeling.fitted_weights import FittedWeight
from ..noise import find_state
from ..noise.functions import ProductNoise
from ..quantizers import quantizer_from_dict

FILE = "noise.safetensors"
_CODES = "codes"

FittedNoise = dict[nn.Module, FittedWeight]


def name_of_uncompressed(model: nn.Module) -> str:
    """Return the first stage of the history: ``"latent weights"`` after noise of rate 1."""
    noise = find_state(model)
    return LATENT if noise is not None and noise.config.trains_latent_weights else DENSE


def data_needed_by(config: QuantizedModelConfig, model: nn.Module) -> str | None:
    """Return the field of a config that needs data to pack a model, or None.

    Lookups that the noise of the model has need not be counted again.
    """
    noise = find_state(model)
    has_lookups = noise is not None and bool(noise.lookups)
    return config.reads_inputs or (None if has_lookups else _counts_lookups(config, model))


def _counts_lookups(config: QuantizedModelConfig, model: nn.Module) -> str | None:
    return None if why_no_row_groups(config, model) else config.counts_lookups


def lookups_for(
    model: nn.Module,
    config: QuantizedModelConfig | QuantNoiseConfig,
    batches: Iterable[Mapping[str, Any]],
    progress: bool = False,
) -> Lookups:
    """Return the lookups that the model's noise has, or those in the batches; {} if not needed."""
    noise = find_state(model)
    if noise is not None and noise.lookups:
        return noise.lookups
    field = config.counts_lookups
    if isinstance(config, QuantizedModelConfig):
        field = _counts_lookups(config, model)
    return count_lookups(model, batches, progress) if field else {}


def fitted_noise(model: nn.Module) -> FittedNoise:
    """Return codebooks, and codes if they were trained, of "pq" noise, by the first layer."""
    state = find_state(model)
    fitted: FittedNoise = {}
    for weight in () if state is None else state.weights:
        for _, noise in weight.noise.functions:
            if isinstance(noise, ProductNoise):
                tensors = {key: tensor.detach() for key, tensor in noise.state.items()}
                codes = tensors.pop(_CODES)
                layer, trained = weight.modules[0], codes if noise.learns else None
                fitted[layer] = FittedWeight.of(layer, noise.quantizer, tensors, trained)
    return fitted


def save_fitted_noise(fitted: FittedNoise, model: nn.Module, folder: str) -> dict[str, Any]:
    """Write the tensors to a file in the folder; return layer name -> quantizer, for JSON."""
    names = {module: name for name, module in model.named_modules()}
    tensors = {}
    for module, weight in fitted.items():
        codes = {} if weight.codes is None else {_CODES: weight.codes}
        for key, tensor in {**weight.state, **codes}.items():
            tensors[f"{names[module]}.{key}"] = tensor.cpu().contiguous().clone()
    if tensors:
        save_file(tensors, os.path.join(folder, FILE))
    return {names[module]: weight.quantizer.to_dict() for module, weight in fitted.items()}


def load_fitted_noise(quantizers: dict[str, Any], model: nn.Module, folder: str) -> FittedNoise:
    """Return what :func:`save_fitted_noise` has written, for a dense model of the same layers."""
    tensors = load_file(os.path.join(folder, FILE)) if quantizers else {}
    fitted: FittedNoise = {}
    for name, settings in quantizers.items():
        quantizer: Any = quantizer_from_dict(settings)
        state = {key: tensors[f"{name}.{key}"] for key in quantizer.state_spec(1, 1)}
        layer, codes = model.get_submodule(name), tensors.get(f"{name}.{_CODES}")
        fitted[layer] = FittedWeight.of(layer, quantizer, state, codes)
    return fitted
