"""Decoders that take and return the keys and values of earlier tokens.

Names, shapes and order are those of optimum and transformers.js:

    input_ids                     (batch, length)
    attention_mask                (batch, past + length)
    position_ids                  (batch, length), if the model takes them
    past_key_values.0.key, ...    (batch, heads, past, head size), where past may be 0
    logits                        (batch, length, words)
    present.0.key, ...            (batch, heads, past + length, head size)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

PAST, PRESENT = "past_key_values.", "present."
_PARTS = ("key", "value")
# Length of the past in the example; unlike any other size there.
_PAST_LENGTH = 3


def require_decoder(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None) -> None:
    """Raise ValueError if a model that generates has an encoder, or gets example inputs."""
    if model.config.is_encoder_decoder:
        raise _unsupported(model)
    if inputs is not None:
        raise ValueError(
            f"invalid inputs: {type(model).__name__} is a decoder, whose graph has fixed inputs "
            "(ids, mask, positions, keys and values); pass inputs=None"
        )


def _unsupported(model: PreTrainedModel) -> ValueError:
    return ValueError(
        f"export_onnx: {type(model).__name__} generates token by token and keeps more than the "
        "keys and values of a decoder's layers, which is not supported; export a model that "
        "runs in one forward pass, e.g. from AutoModelForSequenceClassification, or generate "
        "with the packed folder in transformers"
    )


def example_with_past(
    model: PreTrainedModel, ids: Tensor, output: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return example inputs with the keys and values of earlier tokens.

    Args:
        model: a decoder.
        ids: example input ids, (batch, length).
        output: its output for more than a few tokens.

    Raises:
        ValueError: if the model keeps anything but keys and values.
    """
    layers = getattr(output.get("past_key_values"), "layers", [])
    if not layers or not all(map(_is_supported, layers)):
        raise _unsupported(model)
    batch, length = ids.shape
    total = _PAST_LENGTH + length
    inputs = {"input_ids": ids, "attention_mask": ids.new_ones(batch, total)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = torch.arange(_PAST_LENGTH, total, device=ids.device)
        inputs["position_ids"] = positions.expand(batch, -1).clone()
    past = {f"{PAST}{name}": tensor[:, :, :_PAST_LENGTH] for name, tensor in _named(layers)}
    return {**inputs, **past}


def _is_supported(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and getattr(layer, "keys", None) is not None


def _named(layers: Iterable[Any]) -> Iterable[tuple[str, Tensor]]:
    for index, layer in enumerate(layers):
        for part in _PARTS:
            yield f"{index}.{part}", getattr(layer, f"{part}s")


def with_cache(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return inputs with the past in a cache, as the model takes it; others are unchanged.

    All layers keep all tokens: those with a sliding window mask earlier ones.
    """
    past = [inputs[name] for name in inputs if name.startswith(PAST)]
    if not past:
        return inputs
    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    others = {name: tensor for name, tensor in inputs.items() if not name.startswith(PAST)}
    return {**others, "past_key_values": cache, "use_cache": True}


def present_of(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return keys and values of an output by their names in the graph."""
    layers = getattr(output.get("past_key_values"), "layers", [])
    return {f"{PRESENT}{name}": tensor for name, tensor in _named(layers)}
