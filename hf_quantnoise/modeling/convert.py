"""Conversion of a layer to its packed form and back, in place: the module object stays the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..blocks import matrix_shape, weight_matrix
from ..compat import mark_initialized, own_buffers, own_parameters
from ..dynamic_subclass import change_class
from ..quantizers import Quantizer, RowGroupQuantizer
from ..quantizers.base import CHUNK_ELEMENTS, sum_of_squares
from .activations import rounds_inputs
from .fitted_weights import FittedWeight
from .inference import restore_packed
from .packed import INDICES, INPUT_NAMES, PREFIX, LoadingState, PackedLayer, packed_class

# What a packed layer has in its __dict__ besides the attributes of the original.
_ATTRIBUTES = (
    "quantizer", "rows", "columns", "weight_shape", "activation_bits", "_counts", "_loading",
    "_frozen", "kernels", "dense_form",
)  # fmt: skip


def is_packed(module: nn.Module) -> TypeGuard[PackedLayer]:
    """Return whether a module is a packed layer."""
    return isinstance(module, PackedLayer)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """Return (name, layer) of every packed layer of a model."""
    return ((name, module) for name, module in model.named_modules() if is_packed(module))


def packed_names(layer: nn.Module) -> list[str]:
    """Return the names of the tensors that hold a packed layer's weight; none if it is dense."""
    tensors = layer.tensors() if is_packed(layer) else ()
    return [name for name in tensors if name.startswith(PREFIX)]


@cache
def packed_spec(
    quantizer: Quantizer, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and stored dtype of each tensor that holds a packed (rows, columns) weight.

    Keys are names of the layer's tensors; the codes come first.
    """
    indices = quantizer.indices_shape(rows, columns)
    state = {PREFIX + key: spec for key, spec in quantizer.state_spec(rows, columns).items()}
    return {INDICES: (indices, torch.uint8), **state}


def stored_tensors(
    layer: PackedLayer, tensors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a packed layer's tensors as they are written to a file, by name.

    ``tensors`` are those in memory, if the layer itself does not hold them (offloaded).
    """
    tensors = layer.tensors() if tensors is None else tensors
    state = {key: tensors[PREFIX + key] for key in layer.quantizer.state_spec(1, 1)}
    stored = layer.quantizer.to_storage(state)
    return {**tensors, **{PREFIX + key: tensor for key, tensor in stored.items()}}


@torch.no_grad()
def decode_stored_states(model: nn.Module) -> None:
    """Decode the states of packed layers that transformers has filled with tensors of a file."""
    decoded: dict[int, dict[str, nn.Parameter]] = {}
    for _, layer in packed_layers(model):
        if not layer.quantizer.encodes_state:
            continue
        key = id(layer.weight_indices)  # tied layers share one set
        if key not in decoded:
            state = layer.quantizer.from_storage(layer.state)
            decoded[key] = {
                PREFIX + name: nn.Parameter(tensor.detach())
                for name, tensor in state.items()
                if name not in layer.quantizer.integers
            }
        for name, parameter in decoded[key].items():
            layer.register_parameter(name, parameter)


def _become_packed(
    layers: Sequence[nn.Module],
    quantizer: Quantizer,
    tensors: dict[str, Tensor],
    activation_bits: int | None,
    loading: bool = False,
) -> None:
    """Turn layers that share one weight into packed layers that share one set of tensors."""
    rows, columns = matrix_shape(layers[0])
    shape, dtype = layers[0].weight.shape, layers[0].weight.dtype
    trained = layers[0].weight.requires_grad  # a frozen layer stays frozen
    # Floats before codes: callers take the dtype of a model from its first parameter.
    parameters = {
        name: nn.Parameter(tensors[name], trained and tensors[name].is_floating_point())
        for name in sorted(tensors, key=INDICES.__eq__)
    }
    for layer in layers:
        del own_parameters(layer)["weight"]
        change_class(layer, packed_class(type(layer)))
        has_buffers = bool(own_buffers(layer))
        # Past nn.Module.__setattr__: none of these is a tensor or a module.
        vars(layer).update(quantizer=quantizer, rows=rows, columns=columns, weight_shape=shape)
        layer._frozen = not trained
        if loading:
            layer._loading = LoadingState(is_skeleton=True)
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)
        if rounds_inputs(layer, activation_bits):
            layer.activation_bits = activation_bits
            for name in INPUT_NAMES:  # tied layers read different inputs
                scalar = layer.weight_indices.new_zeros((), dtype=dtype)
                layer.register_parameter(name, nn.Parameter(scalar))
        # Otherwise transformers' _init_weights decodes the weight to initialise a temporary.
        # Buffers of the layer (the scale of Gemma's table) are in no file and need it.
        mark_initialized(layer, not has_buffers)


@torch.no_grad()
def pack_layer(
    layers: nn.Module | Sequence[nn.Module],
    quantizer: Quantizer,
    *,
    seed: int = 0,
    activation_bits: int | None = None,
    importance: Tensor | None = None,
    fitted: FittedWeight | None = None,
    lookups: Tensor | None = None,
) -> float:
    """Quantize the weight of a layer (or of all that share it) and pack them in place.

    ``importance`` weighs the squared error of each value (``importance.py``); None weighs all
    alike. ``activations.calibrate`` sets the scale of inputs that are rounded. ``fitted`` is what
    the noise of the weight was fitted to: a start for the fit, or, if it was trained, the result.
    ``lookups`` counts those of each row of a table that is stored in groups of rows; ``fitted`` has
    them already. Returns the relative error ||W - W_q||^2 / ||W||^2.
    """
    layers = _packable(layers)
    weight = layers[0].weight
    matrix = weight_matrix(layers[0])
    rows, columns = matrix.shape
    if reason := quantizer.check(rows, columns):
        raise ValueError(f"a {rows} x {columns} weight cannot be stored as {quantizer}: {reason}")
    start = None if fitted is None else _moved(fitted.state, matrix.device)
    if start is None and isinstance(quantizer, RowGroupQuantizer):
        if lookups is None:
            raise ValueError(
                "groups of rows need the number of their lookups, which is known for tables of "
                "token ids only; use another scheme for it in layer_quantizers"
            )
        start = {"row_groups": quantizer.row_groups_of(lookups.to(matrix.device))}
    if fitted is not None and fitted.codes is not None:
        state, codes = start, fitted.codes.to(matrix.device)
    else:
        state = quantizer.fit(matrix, seed=seed, importance=importance, init=start)
        codes = quantizer.encode(matrix, state, importance)
    error = _relative_error(matrix, codes, state, quantizer)
    packed = quantizer.pack(codes, state)
    tensors = {INDICES: packed.reshape(packed_spec(quantizer, rows, columns)[INDICES][0]).clone()}
    for key, value in state.items():
        dtype = value.dtype if key in quantizer.integers else weight.dtype
        tensors[PREFIX + key] = value.to(device=weight.device, dtype=dtype)
    _become_packed(layers, quantizer, tensors, activation_bits)
    return error


def _moved(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: tensor.to(device) for key, tensor in state.items()}


def _relative_error(
    matrix: Tensor, codes: Tensor, state: dict[str, Tensor], quantizer: Quantizer
) -> float:
    """Return ||W - W_q||^2 / ||W||^2; raise ValueError if nothing of the weight is left in W_q.

    ``Quantizer.check_values`` refuses most such weights before they are quantized. A few rows are
    decoded at a time, as a large table would double the memory.
    """
    energy, error, any_left = sum_of_squares(matrix), 0.0, False
    step = max(1, CHUNK_ELEMENTS // matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        decoded = quantizer.decode(codes[rows], quantizer.state_of_rows(state, rows))
        error += sum_of_squares(matrix[rows], decoded)
        any_left = any_left or bool(decoded.any())
    if not math.isfinite(error) or (energy > 0 and not any_left):
        dtype = str(matrix.dtype).removeprefix("torch.")
        raise ValueError(
            f"its {quantizer.short_name} values are not finite or all zero in {dtype}; load the "
            "model with dtype=torch.float32, or use other settings"
        )
    return error / energy if energy else 0.0


def pack_skeleton(
    layers: nn.Module | Sequence[nn.Module],
    quantizer: Quantizer,
    activation_bits: int | None = None,
    loading: bool = False,
) -> None:
    """Pack layers as :func:`pack_layer`, with empty tensors on the device of the weight.

    With ``loading`` they are to be loaded; until then ``weight`` only has a shape.
    """
    layers = _packable(layers)
    weight = layers[0].weight
    rows, columns = matrix_shape(layers[0])
    tensors = {}
    integers = {INDICES, *(PREFIX + key for key in quantizer.integers)}
    for name, (shape, dtype) in packed_spec(quantizer, rows, columns).items():
        dtype = dtype if name in integers else weight.dtype
        tensors[name] = torch.empty(shape, dtype=dtype, device=weight.device)
    _become_packed(layers, quantizer, tensors, activation_bits, loading)


def _packable(layers: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """Return the layers as a list, or raise TypeError if one of them cannot be packed."""
    layers = [layers] if isinstance(layers, nn.Module) else list(layers)
    for layer in layers:
        packed_class(type(layer))
    return layers


@torch.no_grad()
def unpack_model(model: nn.Module) -> nn.Module:
    """Give every packed layer its decoded weight and its original class, in place, ties kept."""
    restore_packed(model)
    weights: dict[int, nn.Parameter] = {}
    for _, layer in list(packed_layers(model)):
        key = id(layer.weight_indices)
        if key not in weights:
            state = layer.state
            trained = any(tensor.requires_grad for tensor in state.values())
            if state.keys() <= layer.quantizer.not_trained:
                trained = not layer._frozen
            weights[key] = nn.Parameter(layer.decode().contiguous(), trained)
        for name in [*packed_names(layer), *INPUT_NAMES]:
            own_parameters(layer).pop(name, None)
            own_buffers(layer).pop(name, None)
        for name in _ATTRIBUTES:
            layer.__dict__.pop(name, None)
        change_class(layer, type(layer).original_class)
        # The weight comes first again: optimizers number the parameters.
        others = dict(own_parameters(layer))
        own_parameters(layer).clear()
        layer.register_parameter("weight", weights[key])
        own_parameters(layer).update(others)
    return model
