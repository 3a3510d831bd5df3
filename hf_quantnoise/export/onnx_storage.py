"""Copies of packed models whose layers hold their state as the ONNX file does.

The codebook or the integers of a weight are decoded in forward, so that the graph has the codes.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling import packed_layers
from ..modeling.packed import PREFIX
from ..quantizers import Quantizer
from .onnx_int8 import Int8Product, with_8_bits


class StoredState:
    """Mixin for packed layers that hold their state in storage format and convert it in forward."""

    storage_quantizer: Quantizer
    _dtype: torch.dtype

    @property
    def stored(self) -> dict[str, Tensor]:
        """The state as it is in the file."""
        return {key: getattr(self, PREFIX + key) for key in self.storage_quantizer.state_spec(1, 1)}

    @property
    def state(self) -> dict[str, Tensor]:
        state = self.storage_quantizer.from_storage(self.stored)
        integers = self.storage_quantizer.integers
        return {k: t if k in integers else t.to(self._dtype) for k, t in state.items()}


def copy_with_stored_state(model: PreTrainedModel, int8_layers: set[str]) -> PreTrainedModel:
    """Return a copy in eval mode and float32, whose packed layers have the dtypes of the file.

    Args:
        model: a packed model.
        int8_layers: names of layers whose products are of 8-bit integers. Their codebooks, and
            those of layers tied to them, are rounded to 8 bits.
    """
    model = deepcopy(model).eval()
    nn.Module.float(model)  # past transformers' check; onnxruntime's CPU kernels lack bfloat16
    model.set_experts_implementation("batched_mm")  # ONNX lacks the other ones
    layers = list(packed_layers(model))
    rounded = {id(layer.weight_indices) for name, layer in layers if name in int8_layers}
    stored: dict[int, dict[str, nn.Parameter]] = {}
    for name, layer in layers:
        quantizer: Any = layer.quantizer
        state = {name: tensor.detach() for name, tensor in layer.state.items()}
        key = id(layer.weight_indices)
        if key in rounded:
            quantizer, state = with_8_bits(quantizer, state)
        if key not in stored:  # tied layers continue to share one set of tensors
            stored[key] = {
                PREFIX + name: nn.Parameter(tensor, False)
                for name, tensor in quantizer.to_storage(state).items()
            }
        layer.storage_quantizer, layer._dtype = quantizer, next(iter(state.values())).dtype
        if quantizer.has_codebook:
            # Values read from storage are already rounded.
            layer.quantizer = replace(quantizer, codebook_bits=32)
        for tensor_name, tensor in stored[key].items():
            layer.register_parameter(tensor_name, tensor)
        mixins = (Int8Product, StoredState) if name in int8_layers else (StoredState,)
        layer.__class__ = type(type(layer).__name__, (*mixins, type(layer)), {})
        if name in int8_layers:
            layer.prepare()
    return model
