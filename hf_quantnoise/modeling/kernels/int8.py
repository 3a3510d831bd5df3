"""Products of 8-bit integers, with int32 sums, for layers that round their inputs to integers.

Codes and centroids count from 0 in files. Here half of their range is subtracted, as the product of
torch takes signed integers: x = s_x (x8 + a) and w = s_w (w8 + b) with constants a, b. Then

    sum x w = s_x s_w (sum x8 w8 + a sum w8 + b sum (x8 + a)),

where the sum over w8 is the output of an additional input of ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...compat.products import has_int8_products, int8_product
from ...quantizers import FixedPointQuantizer, ProductQuantizer
from ...quantizers.gather import gather_rows
from .case import Case, bias_of, codes_of, in_slices

INPUTS_AT_A_TIME = 256


@dataclass(frozen=True)
class Integers:
    """A weight (rows, columns), ``scale * (values + offset)``.

    ``values`` are int8; scale and offset are float32, scalars or of shape (rows, 1). No offset is
    one of 0.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None = None


def is_available() -> bool:
    """Return whether the processor multiplies 8-bit integers (AVX-512 VNNI)."""
    return has_int8_products()


def has_integers(layer: Any) -> bool:
    """Return whether the values of a weight are integers of 8 bits or fewer, but for a scale."""
    quantizer = layer.quantizer
    if type(quantizer) is ProductQuantizer:
        return quantizer.codebook_bits == 8
    return isinstance(quantizer, FixedPointQuantizer)


def supports(layer: Any, case: Case) -> bool:
    """Return whether inputs and weight of a layer are integers, and nothing reads the inputs."""
    return (
        layer.activation_bits is not None
        and case.device == "cpu"
        and case.n_inputs > 0
        and type(layer).original_class in (nn.Linear, Conv1D)
        and has_integers(layer)
    )


def integers_of(layer: Any, rows: slice) -> Integers:
    """Return the integers of some rows of a weight."""
    quantizer, state = layer.quantizer, layer.state
    codes = codes_of(layer, rows)
    if isinstance(quantizer, FixedPointQuantizer):
        own = quantizer.state_of_rows(state, rows)
        half, scale = 2 ** (quantizer.bits - 1), own["scale"].float()
        return Integers(_minus(codes, half), scale, half - own["zero_point"].float())
    centroids, scale, zero_point = quantizer.integer_centroids(state)
    values = gather_rows(_minus(centroids, 128), codes).flatten(-2)
    scale = scale.float()
    if quantizer.row_scale:
        scale = scale * quantizer.scales(state)[rows].float()
    return Integers(values, scale, 128 - zero_point.float())


def _minus(codes: Tensor, half: int) -> Tensor:
    """Return codes - half as int8, for uint8 codes below 2 * half."""
    return codes.sub(half).view(torch.int8)  # uint8 wraps around


def run(layer: Any, inputs: Tensor, case: Case) -> Tensor:
    """Return the outputs for inputs that are not rounded yet."""
    flat = inputs.reshape(-1, layer.columns)

    def part(rows: slice) -> Tensor:
        weight, bias = integers_of(layer, rows), bias_of(layer, rows)
        return products(flat, lambda few: round_to_saved_scale(layer, few), weight, bias)

    outputs = in_slices(layer, case, 1, part).to(case.dtype)
    return outputs.view(*inputs.shape[:-1], layer.rows)


def round_to_saved_scale(layer: Any, inputs: Tensor) -> Integers:
    """Return inputs (n, columns) as integers by the layer's ``input_scale``."""
    quantizer = FixedPointQuantizer(bits=layer.activation_bits)
    state = {"scale": layer.input_scale.float(), "zero_point": layer.input_zero_point.float()}
    half = 2 ** (quantizer.bits - 1)
    values = quantizer.levels(inputs, state).sub_(half).to(torch.int8)
    return Integers(values, state["scale"], half - state["zero_point"])


def products(
    inputs: Tensor,
    rounded: Callable[[Tensor], Integers],
    weight: Integers,
    bias: Tensor | None,
) -> Tensor:
    """Return the products of inputs (n, columns), which ``rounded`` maps to integers, and a bias.

    A few inputs are computed at a time, so that they and their outputs stay in a cache.
    """
    outputs = inputs.new_empty(len(inputs), len(weight.values), dtype=torch.float32)
    for start in range(0, len(inputs), INPUTS_AT_A_TIME):
        few = slice(start, start + INPUTS_AT_A_TIME)
        _product(rounded(inputs[few]), weight, bias, outputs[few])
    return outputs


def _product(inputs: Integers, weight: Integers, bias: Tensor | None, outputs: Tensor) -> None:
    """Write the products of integers, with the bias, to ``outputs``."""
    values, n_inputs = inputs.values, len(inputs.values)
    if inputs.offset is not None:
        values = torch.cat([values, values.new_ones(1, values.shape[1])])
    sums = int8_product(values, weight.values)
    scale = weight.scale.reshape(-1)
    outputs.copy_(sums[:n_inputs])
    if inputs.scale.dim():  # one for each input
        outputs.mul_(inputs.scale).mul_(scale)
    else:
        outputs.mul_(inputs.scale * scale)
    constant = bias
    if inputs.offset is not None:
        of_ones = sums[n_inputs] * (inputs.offset * inputs.scale * scale)
        constant = of_ones if bias is None else bias + of_ones
    if constant is not None:
        outputs.add_(constant)
    if weight.offset is not None:
        totals = inputs.values.sum(1, dtype=torch.int32).float()
        if inputs.offset is not None:
            totals.add_(inputs.offset, alpha=values.shape[1])
        by_row = (scale * weight.offset.reshape(-1)).expand(outputs.shape[1])
        outputs.addr_(totals.mul_(inputs.scale.reshape(-1)), by_row)
