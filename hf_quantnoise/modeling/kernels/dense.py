"""Weights that were decoded once, in a dense form, by ``optimize_for_inference``.

A layer with a form holds its packed tensors as before, and ``dense_weight`` in a buffer that is not
saved. In int8 the weight is an object of torch, which rounds inputs by their range in each call;
with ``activation_bits`` it is a matrix of integers with ``dense_scale`` and ``dense_offset``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...compat.products import dynamic_int8_linear, prepacked_int8
from .case import Case
from .int8 import Integers, has_integers, integers_of, products, round_to_saved_scale

FORMS = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
BUFFERS = ("dense_weight", "dense_scale", "dense_offset")


def dense_weight(layer: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a layer holds if its weight is stored as ``dtype``, by name."""
    if dtype != torch.int8:
        return {"dense_weight": layer.decode_rows().to(dtype).contiguous()}
    if layer.activation_bits is not None and has_integers(layer):
        found = integers_of(layer, slice(0, layer.rows))
        tensors = (found.values.contiguous(), found.scale, found.offset)
        return dict(zip(BUFFERS, tensors, strict=True))
    bias = None if layer.bias is None else layer.bias.detach().float()
    return {"dense_weight": prepacked_int8(layer.decode_rows().float(), bias)}


def rounds_by_itself(layer: Any) -> bool:
    """Return whether the form of a layer takes inputs that ``activation_bits`` has not rounded."""
    return hasattr(layer, "dense_scale")


def run(layer: Any, inputs: Tensor) -> Tensor:
    """Return the outputs of inputs (..., columns), in their dtype or that of autocast."""
    weight = layer.dense_weight
    if layer.dense_form == "weight":
        return F.linear(inputs, weight, layer.bias)
    dtype = Case.of(inputs).dtype
    if layer.dense_form != "int8":
        bias = None if layer.bias is None else layer.bias.to(weight.dtype)
        return F.linear(inputs.to(weight.dtype), weight, bias).to(dtype)
    if inputs.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "cannot compute gradients of inputs through int8 products; use "
            "optimize_for_inference(model, 'float32') or restore_packed(model)"
        )
    flat = inputs.reshape(-1, layer.columns)  # also of one dimension
    if rounds_by_itself(layer):
        integers = Integers(weight, layer.dense_scale.float(), layer.dense_offset.float())
        outputs = products(flat, lambda few: round_to_saved_scale(layer, few), integers, layer.bias)
    else:
        outputs = dynamic_int8_linear(flat.float(), weight)
    return outputs.to(dtype).view(*inputs.shape[:-1], layer.rows)
