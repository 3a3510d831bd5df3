"""Products of 8-bit integers in an ONNX graph.

The inputs of a layer are rounded to 8 bits by their range in each call, for all of its inputs
together (``DynamicQuantizeLinear``); with ``activation_bits``, by the saved range. The weight is
the integers that it is stored as: the 8-bit codebook, read by the codes, or those of intN. With x =
s_x (x8 - z_x) and w = s_w (w8 - z_w)

    x w = s_x s_w MatMulInteger(x8, w8, z_x, z_w),

which sums in int32. Files hold uint8; 128 is subtracted, as onnxruntime multiplies uint8 inputs
with int8 weights fastest. A zero point of the weight that was trained is between two integers: the
product is that with the nearest one n_w, plus s_x s_w (n_w - z_w) sum(x8 - z_x).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..modeling import packed_layers
from ..quantizers import FixedPointQuantizer, ProductQuantizer
from ..quantizers.gather import gather_rows


def int8_layers(model: nn.Module) -> tuple[set[str], dict[str, str]]:
    """Return the packed layers that can have int8 products, and why others cannot, by name.

    Tables have no products; tied to a head, their products are those of the head.
    """
    found, others = set(), {}
    for name, layer in packed_layers(model):
        if reason := _why_float(layer):
            others[name] = reason
        elif not isinstance(layer, nn.Embedding):
            found.add(name)
    return found, others


def _why_float(layer: Any) -> str | None:
    """Return why the products of a layer cannot be of 8-bit integers, or None if they can."""
    if isinstance(layer, nn.Embedding):
        return None
    original, quantizer = type(layer).original_class, layer.quantizer
    if original not in (nn.Linear, Conv1D):
        return f"int8 products are those of Linear and Conv1D, and it is a {original.__name__}"
    if type(quantizer) not in (ProductQuantizer, FixedPointQuantizer):
        return f"its weight ({quantizer.short_name}) is not one integer per value"
    quantizer, state = with_8_bits(quantizer, layer.state)
    zero_points = _zero_point(quantizer, quantizer.to_storage(state)).round()
    if layer.activation_bits is not None:
        inputs = layer.input_zero_point.reshape(-1) - 128
        if not is_integer(inputs):  # an average of models
            return "the zero point of its inputs is not an integer"
        zero_points = torch.cat([zero_points.reshape(-1), inputs])
    if bool((zero_points < -128).any() or (zero_points > 127).any()):
        return "the range of its weight or inputs does not contain 0"
    return None


def with_8_bits(quantizer: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return quantizer and state with the codebook in 8 bits; intN and 8 bits are unchanged."""
    if not quantizer.has_codebook or quantizer.codebook_bits == 8:
        return quantizer, state
    quantizer = replace(quantizer, codebook_bits=8)
    return quantizer, quantizer.state_of(state["codebook"], state.get("row_scale"))


def is_integer(tensor: Tensor) -> bool:
    """Return whether all values of a tensor are integers."""
    return bool((tensor == tensor.round()).all())


def _zero_point(quantizer: Any, stored: dict[str, Tensor]) -> Tensor:
    """Return the zero point of the weight's int8 values, in float32."""
    if quantizer.has_codebook:
        return stored["codebook_zero_point"].float() - 128
    return stored["zero_point"].float() - (128 if quantizer.bits == 8 else 0)


def _as_int8(values: Tensor) -> Tensor:
    """Return uint8 values - 128 as int8."""
    return (values.to(torch.int16) - 128).to(torch.int8)


class Int8Product:
    """Mixin, before ``StoredState``, for packed layers whose products are of integers."""

    has_integer_zero_point: bool

    def prepare(self: Any) -> None:
        """Look at the values of the state, which a traced forward cannot do."""
        zero_point = _zero_point(self.storage_quantizer, self.stored)
        self.has_integer_zero_point = is_integer(zero_point)

    def forward(self: Any, input: Tensor) -> Tensor:
        """Return the product with the rounded inputs, and the bias."""
        values, scale, zero_point = self._weight_integers()
        rounded, input_scale, input_zero_point = self._input_integers(input)
        nearest = zero_point.round()
        sums = torch.onnx.ops.symbolic(
            "MatMulInteger",
            (rounded, values.t(), input_zero_point, nearest.to(torch.int8)),
            dtype=torch.int32,
            shape=(*input.shape[:-1], self.rows),
        )
        # In this order onnxruntime computes all of it as one operator.
        outputs = sums.float() * (input_scale * scale)
        outputs = outputs if self.bias is None else outputs + self.bias
        if self.has_integer_zero_point:
            return outputs
        input_sums = (rounded.float() - input_zero_point.float()).sum(-1, keepdim=True)
        return outputs + input_sums * (input_scale * scale * (nearest - zero_point))

    def _input_integers(self: Any, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs as uint8, their scale and zero point."""
        if self.activation_bits is None:
            shapes = (inputs.shape, (), ())
            dtypes = (torch.uint8, torch.float32, torch.uint8)
            rounded, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
                "DynamicQuantizeLinear", (inputs,), dtypes=dtypes, shapes=shapes
            )
            return rounded, scale, zero_point
        state = {"scale": self.input_scale, "zero_point": self.input_zero_point}
        levels = FixedPointQuantizer(bits=self.activation_bits).levels(inputs, state)
        return levels.to(torch.uint8), state["scale"].float(), state["zero_point"].to(torch.uint8)

    def _weight_integers(self: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight as int8 (rows, columns), its scale and zero point in float32.

        These are scalars, or one for each row.
        """
        quantizer, stored = self.storage_quantizer, self.stored
        codes = quantizer.unpack(self.weight_indices, stored, (self.rows, self.columns))
        if quantizer.has_codebook:
            values = gather_rows(_as_int8(stored["codebook"]), codes).flatten(-2)
            scale = stored["codebook_scale"].float()
            if quantizer.row_scale:
                scale = scale * stored["row_scale"].float()
        else:
            values = _as_int8(codes) if quantizer.bits == 8 else codes.to(torch.int8)
            scale = stored["scale"].float()
        return values, _as_vector(scale), _as_vector(_zero_point(quantizer, stored))


def _as_vector(tensor: Tensor) -> Tensor:
    """Return a tensor of shape (rows, 1) as (rows,); a scalar is unchanged."""
    return tensor.reshape(-1) if tensor.dim() else tensor
