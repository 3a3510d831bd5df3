"""Packed layers: codes and codebook in place of a weight, in a subclass of the layer's own class.

A packed layer holds two kinds of parameters: ``weight_indices`` (uint8, the packed codes, no
gradient) and the float state of its quantizer, e.g. ``weight_codebook``. ``weight`` becomes a
property that decodes, so every forward written for the original layer still works; the forwards
below decode no more than they need: looked-up rows of a table, a bounded slice of a matrix.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..blocks import layout_of
from ..dynamic_subclass import DynamicSubclass, make_dynamic_subclass
from ..quantizers import Quantizer
from ..quantizers.fixed_point import round_activations
from ..quantizers.packing import unpack_codes
from .activations import InputObserver
from .non_trainable import NonTrainableParameter
from .read_only_weight import refuse, shown
from .stored import take_stored

PREFIX = "weight_"
INDICES = "weight_indices"
INPUT_NAMES = ("input_scale", "input_zero_point")

# Without gradients a matrix is decoded slice by slice, so that a large table (a tied LM head)
# never stands whole in memory.
SCRATCH_BYTES = 8 * 2**20


class _AverageOverBlocks(torch.autograd.Function):
    """Identity whose gradient is divided by the number of blocks of each codeword.

    Autograd sums the gradients of a codeword's blocks; section 3.2 averages them:
    c <- c - eta / |J_c| * sum over (k, l) in J_c of dL/db_kl.
    """

    @staticmethod
    def forward(ctx, codebook: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return codebook.view_as(codebook)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (counts,) = ctx.saved_tensors
        return gradient / counts.clamp(min=1).to(gradient.dtype)[:, None], None


class PackedLayer(DynamicSubclass):
    """Mixin of every packed layer; see the module's docstring.

    Attributes:
        quantizer: how the weight is stored.
        rows, columns: shape of the weight matrix (``blocks.py``).
        weight_shape: shape of the weight itself.
        activation_bits: bits that what enters the layer is rounded to (``activations.py``), or
            None. Scale and zero point are ``input_scale`` and ``input_zero_point``.
    """

    quantizer: Quantizer
    rows: int
    columns: int
    weight_shape: torch.Size
    activation_bits: int | None = None
    _observer: InputObserver | None = None

    # While a checkpoint is being read the codes are not there yet; transformers still asks for the
    # weight's shape. True answers with an empty meta tensor instead of decoding.
    _shape_only: bool = False
    # True from when this package has read all that the layer holds until the end of the loading:
    # transformers, which fills what stands in the state dict, passes the layer over.
    _is_read: bool = False
    _counts: Tensor | None = None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The original forward, on rounded inputs where activations are quantized."""
        if self._observer is not None:
            self._observer.observe(input)
        elif self.activation_bits is not None:
            state = {"scale": self.input_scale, "zero_point": self.input_zero_point}
            input = round_activations(input, state, self.activation_bits)
        return super().forward(input, *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, differentiable in the float state; in the layout of the original."""
        if self._shape_only:
            # Outputs first whatever the layout: transformers pads biases by the first dimension of
            # a tied weight, and would cut those of a Conv1D.
            return torch.empty(self.rows, self.columns, device="meta")
        return shown(self.decode())

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # PEFT gives a layer its own weight back where it takes an adapter off.
        own = self.decode()
        if value.shape != own.shape or not torch.equal(value, own):
            refuse()

    def decode(self) -> Tensor:
        """The weight as a plain tensor, in the layout and shape of the original."""
        return layout_of(self).from_matrix(self.decode_rows(), self.weight_shape)

    @property
    def state(self) -> dict[str, Tensor]:
        """The quantizer's float state as parameters, without the averaging of gradients."""
        return {key: getattr(self, PREFIX + key) for key in self.quantizer.state_spec(1, 1)}

    @state.setter
    def state(self, value: dict[str, Tensor]) -> None:
        # PEFT gives every layer that it wraps its own state (bitsandbytes keeps something there).
        own = self.state
        if value.keys() != own.keys() or any(value[key] is not own[key] for key in own):
            raise AttributeError("the state of a packed layer is its parameters: set those")

    @property
    def codes_per_row(self) -> int:
        """Number of codes in a row: one for each block, or several."""
        return self.columns // self.quantizer.block_size * self.quantizer.codes_per_block

    @property
    def rows_are_aligned(self) -> bool:
        """Whether each row of codes begins on a byte, so that rows can be read alone."""
        return self.weight_indices.dim() == 2

    def codes(self, rows: Tensor | slice | None = None) -> Tensor:
        """The codes, shape (rows, codes_per_row); or those of some rows."""
        packed = self.weight_indices
        if rows is not None and self.rows_are_aligned:
            # A tensor's rows are selected, not indexed: -1 is an error here, as in any table.
            own = packed[rows] if isinstance(rows, slice) else packed.index_select(0, rows)
            packed, rows, n_rows = own, None, own.shape[0]
        else:
            n_rows = self.rows
        codes = unpack_codes(
            packed.reshape(-1), self.quantizer.code_bits, n_rows * self.codes_per_row
        ).view(n_rows, self.codes_per_row)
        return codes if rows is None else codes[rows]

    def decode_rows(self, rows: Tensor | slice | None = None) -> Tensor:
        """The decoded matrix (rows, columns), or some of its rows."""
        codes, state = self.codes(rows), self.state
        if torch.is_grad_enabled() and "codebook" in state and state["codebook"].requires_grad:
            state["codebook"] = _AverageOverBlocks.apply(state["codebook"], self.block_counts())
        if rows is not None:
            state = self.quantizer.state_of_rows(state, rows)
        return self.quantizer.decode(codes, state)

    def block_counts(self) -> Tensor:
        """|J_c|: how many blocks each codeword is used for, one for each row of the codebook."""
        device = self.weight_indices.device
        if self._counts is None or self._counts.device != device:
            rows = self.quantizer.codebook_rows(self.codes()).reshape(-1).int()
            counts = torch.bincount(rows, minlength=self.weight_codebook.shape[0])
            object.__setattr__(self, "_counts", counts)
        return self._counts

    def row_slices(self, itemsize: int) -> list[slice]:
        """Slices of rows whose decoded form stays within :data:`SCRATCH_BYTES`."""
        step = max(1, SCRATCH_BYTES // (self.columns * itemsize))
        if not self.rows_are_aligned or step >= self.rows:
            return [slice(0, self.rows)]
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; what is never trained becomes a :class:`NonTrainableParameter`, in
        place, as tied layers hold the same object and transformers marks what it has read."""
        if type(param) is nn.Parameter and (
            name in (INDICES, *INPUT_NAMES)
            or name.removeprefix(PREFIX) in self.quantizer.not_trained
        ):
            param.requires_grad = False
            param.__class__ = NonTrainableParameter
        super().register_parameter(name, param)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self._is_read:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self._counts = None
        names = {key: f"{prefix}{PREFIX}{key}" for key in self.state}
        assign = local_metadata.get("assign_to_params_buffers", False)
        error_msgs += take_stored(self, names, state_dict, assign)
        return super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == INDICES:
            object.__setattr__(self, "_counts", None)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The original's description, and how the weight is stored."""
        original = super().extra_repr()
        return f"{original}{', ' if original else ''}stored={self.quantizer}"


def _sliced_linear(layer: PackedLayer, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """``inputs @ matrix.T + bias`` with the matrix decoded slice by slice."""
    slices = layer.row_slices(inputs.element_size())
    parts = [
        F.linear(inputs, layer.decode_rows(rows), None if bias is None else bias[rows])
        for rows in slices
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _LinearForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return _sliced_linear(self, input, self.bias)


class _Conv1DForward(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return _sliced_linear(self, x, self.bias)


class _EmbeddingForward(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None or not self.rows_are_aligned:
            return super().forward(input)
        rows = self.decode_rows(input.reshape(-1)).view(*input.shape, self.columns)
        if self.padding_idx is None or not rows.requires_grad:
            return rows
        # As in nn.Embedding, the padding row gives no gradient.
        return torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)


# A convolution's own forward reads ``weight`` once: it needs no frugal one.
_FORWARDS = {
    nn.Linear: _LinearForward,
    Conv1D: _Conv1DForward,
    nn.Embedding: _EmbeddingForward,
    nn.Conv2d: nn.Conv2d,
}


@cache
def packed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The packed subclass of a layer class.

    Subclasses that add behaviour (a position offset, an embedding scale) keep it: the frugal
    forward enters the method resolution order behind them.
    """
    base = next(base for base in _FORWARDS if issubclass(cls, base))
    own = () if cls is base else (cls,)
    bases = (PackedLayer, *own, _FORWARDS[base])
    return make_dynamic_subclass("Packed", cls, bases, packed_class, __doc__=PackedLayer.__doc__)
