"""From a layer to its packed form and back, in place: the module object stays the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..blocks import matrix_shape, weight_matrix
from ..quantizers import Quantizer
from ..quantizers.packing import pack_codes
from .activations import rounds_inputs
from .packed import INDICES, INPUT_NAMES, PREFIX, PackedLayer, packed_class
from .stored import COME


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a packed layer."""
    return isinstance(module, PackedLayer)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every packed layer of a model."""
    return ((name, module) for name, module in model.named_modules() if is_packed(module))


def packed_names(layer: nn.Module) -> list[str]:
    """Names of the tensors that hold a packed layer's weight, without its bias."""
    return [name for name in layer._parameters if name.startswith(PREFIX)]


def _indices_shape(quantizer: Quantizer, rows: int, columns: int) -> tuple[int, ...]:
    """(rows, bytes per row) where rows begin on a byte, else the flat number of bytes."""
    codes_per_row = columns // quantizer.block_size * quantizer.codes_per_block
    bits_per_row = codes_per_row * quantizer.code_bits
    if bits_per_row % 8 == 0:
        return rows, bits_per_row // 8
    return (-(-rows * bits_per_row // 8),)


def packed_shapes(quantizer: Quantizer, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that holds a packed (rows, columns) weight, by name."""
    shapes = {INDICES: _indices_shape(quantizer, rows, columns)}
    for key, (shape, _) in quantizer.state_spec(rows, columns).items():
        shapes[PREFIX + key] = tuple(shape)
    return shapes


def _parameters(quantizer: Quantizer, tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Parameters of a packed layer; codes, and what its quantizer says is not trained, get no
    gradient."""
    frozen = {PREFIX + key for key in quantizer.not_trained}
    return {
        name: nn.Parameter(tensor, tensor.is_floating_point() and name not in frozen)
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def read_states(model: nn.Module) -> None:
    """After a checkpoint was read: the float state of every packed layer gets its working form."""
    read: dict[int, dict[str, nn.Parameter]] = {}
    for _, layer in packed_layers(model):
        if not layer.quantizer.is_stored_otherwise:
            continue
        key = id(layer.weight_indices)  # tied layers go on sharing one set
        if key not in read:
            state = layer.quantizer.from_storage(layer.state)
            tensors = {PREFIX + name: tensor.detach() for name, tensor in state.items()}
            read[key] = _parameters(layer.quantizer, tensors)
        for name, parameter in read[key].items():
            layer.register_parameter(name, parameter)


def _become_packed(
    layers: Sequence[nn.Module],
    quantizer: Quantizer,
    tensors: dict[str, Tensor],
    activation_bits: int | None,
) -> None:
    """Turns layers that share one weight into packed layers that share one set of tensors."""
    rows, columns = matrix_shape(layers[0])
    shape, dtype = layers[0].weight.shape, layers[0].weight.dtype
    # Floats before codes: many programs ask a model's first parameter for the dtype to compute in.
    floats_first = {name: tensors[name] for name in sorted(tensors, key=INDICES.__eq__)}
    parameters = _parameters(quantizer, floats_first)
    for layer in layers:
        del layer._parameters["weight"]
        layer.__class__ = packed_class(type(layer))
        # No attribute of these is a tensor or a module, for which torch would look.
        vars(layer).update(quantizer=quantizer, rows=rows, columns=columns, weight_shape=shape)
        for name, parameter in parameters.items():
            layer.register_parameter(name, parameter)
        if rounds_inputs(layer, activation_bits):
            layer.activation_bits = activation_bits
            for name in INPUT_NAMES:  # tied layers read different inputs
                scalar = layer.weight_indices.new_zeros((), dtype=dtype)
                layer.register_parameter(name, nn.Parameter(scalar, requires_grad=False))
        # Else transformers' _init_weights decodes the weight to initialise a temporary. It must
        # have layers with buffers of their own (the scale of Gemma's table): no file holds those.
        layer._is_hf_initialized = not layer._buffers


@torch.no_grad()
def pack_layer(
    layers: nn.Module | Sequence[nn.Module],
    quantizer: Quantizer,
    *,
    seed: int = 0,
    activation_bits: int | None = None,
    importance: Tensor | None = None,
) -> float:
    """Quantizes the weight of a layer (or of several that are tied) and packs them in place.

    Args:
        layers: the layer, or all layers that hold the very same weight.
        quantizer: how the weight is to be stored.
        seed: seed of the codebook.
        activation_bits: bits of what enters the layer; ``activations.calibrate`` sets its scale.
        importance: weight of each number's squared error (``importance.py``); None: all alike.

    Returns:
        The relative error ||W - W_q||^2 / ||W||^2.

    Raises:
        ValueError: if the quantizer cannot take the weight's shape.
    """
    layers = [layers] if isinstance(layers, nn.Module) else list(layers)
    weight = layers[0].weight
    matrix = weight_matrix(layers[0])
    rows, columns = matrix.shape
    if reason := quantizer.check(rows, columns):
        raise ValueError(f"a {rows} x {columns} weight cannot be stored as {quantizer}: {reason}")
    state = quantizer.fit(matrix, seed=seed, importance=importance)
    codes = quantizer.encode(matrix, state, importance)
    decoded = quantizer.decode(codes, state)
    error = (matrix.float() - decoded.float()).square().sum() / matrix.float().square().sum()
    packed = pack_codes(codes.reshape(-1), quantizer.code_bits)
    tensors = {INDICES: packed.reshape(_indices_shape(quantizer, rows, columns)).clone()}
    for key, value in state.items():
        tensors[PREFIX + key] = value.to(device=weight.device, dtype=weight.dtype)
    _become_packed(layers, quantizer, tensors, activation_bits)
    return float(error.nan_to_num())


def pack_skeleton(
    layers: nn.Module | Sequence[nn.Module],
    quantizer: Quantizer,
    activation_bits: int | None = None,
) -> None:
    """Packs layers without quantizing anything: empty tensors of the right shape, on the weight's
    device (``meta`` while a checkpoint is being loaded), to be filled from a file."""
    layers = [layers] if isinstance(layers, nn.Module) else list(layers)
    weight = layers[0].weight
    rows, columns = matrix_shape(layers[0])
    tensors = {
        name: torch.empty(
            shape, dtype=torch.uint8 if name == INDICES else weight.dtype, device=weight.device
        )
        for name, shape in packed_shapes(quantizer, rows, columns).items()
    }
    _become_packed(layers, quantizer, tensors, activation_bits)


@torch.no_grad()
def unpack_model(model: nn.Module) -> nn.Module:
    """Gives every packed layer its decoded weight and its own class back, ties kept. In place."""
    weights: dict[int, nn.Parameter] = {}
    for _, layer in list(packed_layers(model)):
        key = id(layer.weight_indices)
        if key not in weights:
            weights[key] = nn.Parameter(layer.decode().contiguous())
        for name in [*packed_names(layer), *INPUT_NAMES]:
            layer._parameters.pop(name, None)
        for name in (
            "activation_bits",
            "quantizer",
            "rows",
            "columns",
            "weight_shape",
            "_counts",
            "_shape_only",
            "_is_read",
            COME,
        ):
            layer.__dict__.pop(name, None)
        layer.__class__ = type(layer).original_class
        others = dict(layer._parameters)
        layer._parameters.clear()  # the weight stands first again, as optimizers count parameters
        layer.register_parameter("weight", weights[key])
        layer._parameters.update(others)
    return model
