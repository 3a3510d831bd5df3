"""``nn.Linear``, and GPT-2's ``Conv1D``, a Linear whose weight is transposed: (in, out)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .record import LayerType, records_gradients, register_layer_type


class PackedLinearForward(nn.Linear):
    """Forward of a packed Linear: without gradients the weight is never fully decoded."""

    def forward(self, input: Tensor) -> Tensor:
        is_decoded = records_gradients() and self.dense_form is None
        return super().forward(input) if is_decoded else self.linear(input)


class PackedConv1DForward(Conv1D):
    """Forward of a packed ``Conv1D``: without gradients the weight is never fully decoded."""

    def forward(self, x: Tensor) -> Tensor:
        is_decoded = records_gradients() and self.dense_form is None
        return super().forward(x) if is_decoded else self.linear(x)


def _input_energy(layer: nn.Module, inputs: Tensor) -> Tensor:
    return inputs.float().reshape(-1, inputs.shape[-1]).square().sum(0)[None]


register_layer_type(
    LayerType(layer_class=nn.Linear, packed_forward=PackedLinearForward, input_energy=_input_energy)
)
register_layer_type(
    LayerType(
        layer_class=Conv1D,
        to_matrix=lambda weight: weight.t(),
        from_matrix=lambda matrix, shape: matrix.t(),
        packed_forward=PackedConv1DForward,
        input_energy=_input_energy,
    )
)
