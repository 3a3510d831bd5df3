"""Packed layers: codes and a codebook instead of a weight, in a subclass of the layer's class.

A packed layer holds ``weight_indices``, a buffer with the packed codes (uint8), and the float state
of its quantizer, e.g. ``weight_codebook``: parameters, except for scales that are never trained
(``non_trainable.py``). ``weight`` becomes a property that decodes, so the forward of the original
class still works. The packed forwards of ``layer_types/`` decode only what they need: looked-up
rows of a table, a bounded slice of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import own_buffers, own_parameters
from ..compat.torch_func import in_torch_func
from ..dynamic_subclass import DynamicSubclass, make_dynamic_subclass
from ..layer_types import known_layer_type
from ..quantizers import Quantizer
from ..quantizers.fixed_point import round_activations
from .kernels import KERNELS, rounds_inputs, run_kernel
from .lazy_weight import LazyWeight
from .non_trainable import NonTrainableParameter
from .read_only_weight import raise_read_only
from .stored_state import decode_state_dict
from .value_check import invalid_values

PREFIX = "weight_"
INDICES = "weight_indices"
INPUT_NAMES = ("input_scale", "input_zero_point")


@dataclass
class LoadingState:
    """Progress of a packed layer while a checkpoint is loaded; None for a layer in use."""

    # The layer is empty: ``weight`` is a meta tensor, since transformers asks for its shape.
    is_skeleton: bool = False
    # All tensors are read, and hidden from the state dict: transformers must not read them again.
    is_read: bool = False
    # The quantizer's state in the shards loaded so far (``stored_state.py``).
    partial_state: dict[str, Tensor] = field(default_factory=dict)


class PackedLayer(DynamicSubclass):
    """Mixin of every packed layer, see the docstring of the module.

    Attributes:
        quantizer: how the weight is stored.
        rows, columns: shape of the weight matrix (``blocks.py``).
        weight_shape: shape of the weight itself.
        activation_bits: number of bits that inputs are rounded to (``activations.py``), or None.
            Their scale and zero point are ``input_scale`` and ``input_zero_point``.
        kernels: names of the kernels that it may use (``kernels/``), besides ``"decode"``.
        dense_form: form in which it holds the decoded weight as well (``inference.py``), where
            ``"weight"`` is its own dtype; None if it has only codes.
    """

    quantizer: Quantizer
    rows: int
    columns: int
    weight_shape: torch.Size
    activation_bits: int | None = None
    kernels: Collection[str] = tuple(KERNELS)
    dense_form: str | None = None

    _loading: LoadingState | None = None
    _counts: Tensor | None = None  # cache of block_counts
    _frozen: bool = False  # whether the weight was, before it was packed

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The original forward, on rounded inputs if activations are quantized."""
        if self.dense_form is not None and self.training:
            raise self._is_optimized("train")
        if self.activation_bits is not None:
            if rounds_inputs(self, input):
                return self.linear(input)
            state = {"scale": self.input_scale, "zero_point": self.input_zero_point}
            input = round_activations(input, state, self.activation_bits)
        return super().forward(input, *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The decoded weight in its original shape, differentiable in the quantizer's state.

        It is decoded when its values are needed (``lazy_weight.py``), or at once in a graph.
        """
        if self._loading is not None and self._loading.is_skeleton:
            # Rows first for every layer type: transformers pads the bias to the first dimension of
            # a tied weight, and would cut that of a Conv1D.
            return torch.empty(self.rows, self.columns, device="meta")
        if torch.compiler.is_compiling():
            return self.decode()
        state = self.state
        like = next(tensor for tensor in state.values() if tensor.is_floating_point())
        weight = LazyWeight.of(self.decode, self.weight_shape, like, state.values())
        return weight.decoded if torch.jit.is_tracing() or in_torch_func() else weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # PEFT assigns a layer its own weight when it removes an adapter.
        weight = self.decode()
        if value.shape != weight.shape or not torch.equal(value, weight):
            raise_read_only()

    def decode(self) -> Tensor:
        """Return the weight as a regular tensor, in the shape of the original."""
        matrix = self.dense_weight if self.dense_form == "weight" else self.decode_rows()
        return known_layer_type(self).from_matrix(matrix, self.weight_shape)

    @property
    def state(self) -> dict[str, Tensor]:
        """The quantizer's float state, as parameters."""
        return {key: getattr(self, PREFIX + key) for key in self.quantizer.state_spec(1, 1)}

    @state.setter
    def state(self, value: dict[str, Tensor]) -> None:
        # PEFT assigns every layer that it wraps its own state (bitsandbytes keeps data there).
        state = self.state
        if value.keys() != state.keys() or any(value[key] is not state[key] for key in state):
            raise AttributeError(
                "the state of a packed layer cannot be assigned; set its parameters "
                f"({', '.join(PREFIX + key for key in state)}) instead"
            )

    @property
    def n_codes(self) -> int:
        """Number of codes: one or more per block."""
        return self.quantizer.n_codes(self.rows, self.columns)

    @property
    def rows_are_aligned(self) -> bool:
        """Whether each row of codes begins on a byte, so that single rows can be read."""
        return self.quantizer.rows_are_aligned(self.columns)

    def codes(self) -> Tensor:
        """Return the codes, as ``quantizer.encode`` does."""
        return self.quantizer.unpack(self.weight_indices, self.state, self._shape)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def decode_rows(self, rows: Tensor | slice | None = None) -> Tensor:
        """Return the decoded matrix (rows, columns), or some of its rows."""
        state, shape = self.quantizer.averaging(self.state, self.block_counts), self._shape
        codes = self.quantizer.unpack(self.weight_indices, state, shape, rows)
        if rows is not None:
            state = self.quantizer.state_of_rows(state, rows)
        return self.quantizer.decode(codes, state)

    def block_counts(self) -> Tensor:
        """Return |J_c|, the number of blocks of each centroid."""
        device = self.weight_indices.device
        quantizer: Any = self.quantizer  # has a codebook
        if self._counts is None or self._counts.device != device:
            counts = quantizer.block_counts(self.codes(), self.state)
            object.__setattr__(self, "_counts", counts)
            return counts
        return self._counts

    def linear(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ matrix.T + bias`` without gradients, see ``kernels/``."""
        return run_kernel(self, inputs)

    def is_never_trained(self, name: str) -> bool:
        """Return whether a tensor of this name holds codes, or a scale that is not trained."""
        is_state = name.removeprefix(PREFIX) in self.quantizer.not_trained
        return is_state or name in (INDICES, *INPUT_NAMES)

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's tensors by name, without buffers of its original class."""
        buffers = own_buffers(self).items()
        fixed = {name: tensor for name, tensor in buffers if self.is_never_trained(name)}
        tensors: dict[str, Any] = {**own_parameters(self), **fixed}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, or a buffer if it is never trained (``non_trainable.py``)."""
        if name == "weight":
            raise_read_only()  # torch would raise a KeyError
        if name == INDICES:
            self._counts = None
        if param is None or not self.is_never_trained(name):
            super().register_parameter(name, param)
            return
        if type(param) is nn.Parameter:
            param.requires_grad = False
            param.__class__ = NonTrainableParameter  # in place, as tied layers hold it as well
        elif type(param) is not NonTrainableParameter:
            param = NonTrainableParameter(param)
        if self._loading is not None and self._loading.is_skeleton:
            own_parameters(self)[name] = param
        else:
            own_parameters(self).pop(name, None)
            own_buffers(self)[name] = param

    def finish_loading(self) -> None:
        """Put the layer in use: what is never trained becomes a buffer, unless it is offloaded."""
        self._loading = None
        for name, parameter in list(own_parameters(self).items()):
            if self.is_never_trained(name) and not parameter.is_meta:
                self.register_parameter(name, parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Convert in place what is never trained, so that tied layers continue to share it.

        If ``fn`` raises (out of memory), the layer keeps all its tensors.
        """
        buffers = own_buffers(self)
        fixed = {name: buffers.pop(name) for name in list(buffers) if self.is_never_trained(name)}
        try:
            super()._apply(fn, recurse)
            for name, tensor in fixed.items():
                converted = fn(tensor)
                if tensor.is_meta == converted.is_meta:
                    tensor.data = converted
                else:
                    fixed[name] = NonTrainableParameter(converted)
        finally:
            buffers.update(fixed)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._loading is None or not self._loading.is_read:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self._counts = None
        if self.dense_form is not None:
            raise self._is_optimized("load a state dict into")
        if reasons := self._invalid_values(state_dict, prefix):
            error_msgs += reasons
            return None
        names = {key: f"{prefix}{PREFIX}{key}" for key in self.state}
        loading = self._loading = self._loading or LoadingState()
        assign = local_metadata.get("assign_to_params_buffers", False)
        decode_state_dict(self, names, state_dict, loading.partial_state, assign)
        if not loading.partial_state and not loading.is_skeleton:
            self._loading = None
        return super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _is_optimized(self, action: str) -> ValueError:
        return ValueError(
            f"cannot {action} a model that is optimized for inference, as it computes with weights "
            "that were decoded before; call restore_packed(model) first"
        )

    def _invalid_values(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        """Return what is wrong with the values of this layer in a state dict."""
        keys = [INDICES, *INPUT_NAMES, *(PREFIX + key for key in self.state)]
        found = []
        for key in keys:
            own, tensor = getattr(self, key, None), state_dict.get(prefix + key)
            if own is None or tensor is None or tensor.is_meta or tensor.shape != own.shape:
                continue  # torch compares names and shapes
            name = key.removeprefix(PREFIX)
            if reason := invalid_values(self.quantizer, self.n_codes, name, tensor):
                found.append(f"invalid {prefix}{key}: {reason}")
        return found

    def extra_repr(self) -> str:
        original = super().extra_repr()
        return f"{original}{', ' if original else ''}stored={self.quantizer}"


@cache
def packed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the packed subclass of a layer class.

    Subclasses that add behaviour (a position offset, an embedding scale) keep it: the packed
    forward follows them in the method resolution order. Raises TypeError if the type is unknown.
    """
    layer_type = known_layer_type(cls)
    if layer_type.packed_forward is None:
        raise TypeError(f"{cls.__name__} cannot be packed: its LayerType has no packed_forward")
    subclass = () if cls is layer_type.layer_class else (cls,)
    bases = (PackedLayer, *subclass, layer_type.packed_forward)
    return make_dynamic_subclass("Packed", cls, bases, packed_class, __doc__=PackedLayer.__doc__)
