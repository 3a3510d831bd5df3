"""More memory for more speed: packed layers that hold their decoded weight as well."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..argument_checks import require_in_memory, require_model
from ..compat.peft import has_adapters
from ..compat.products import has_bf16_products
from ..layer_types import known_layer_type
from .kernels import dense, int8
from .packed import PackedLayer

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
# Attribute of an optimized model: the parameters that had gradients, and whether it had adapters.
_TRAINED = "_trained_before_optimizing"
Made = dict[tuple[int, int, torch.dtype], dict[str, Any]]


@torch.no_grad()
def optimize_for_inference(model: Model, form: str | None = None) -> Model:
    """Decode the weights of a packed model once, in place, which makes it as fast as a dense one.

    The model keeps its class, its packed tensors and its ties; it works in ``generate`` and
    pipelines, and ``save_pretrained`` writes the packed form. Embedding tables stay packed, since
    only looked-up rows are decoded. Layers that were not packed are unchanged. Inputs and outputs
    of layers keep their dtype. The model is put in eval mode, and its parameters are frozen until
    :func:`restore_packed` is called. Writes to them have no effect.

    Args:
        model: any model with packed layers.
        form: how decoded weights of ``nn.Linear`` and ``Conv1D`` are stored and multiplied:
            ``"float32"``; ``"bf16"``; or ``"int8"``, the dynamic int8 of torch: a
            scale per row, and inputs that are rounded to 8 bits by their range in each call. With
            ``activation_bits`` and a weight of integers, both are those of the packed model.
            Other layers (convolutions, subclasses with a separate forward) are decoded in the dtype
            of the model. None takes ``"bf16"`` on a device that multiplies bfloat16 in hardware,
            otherwise ``"float32"``, since products in bfloat16 take several times as long there.

    Returns:
        The model.

    Raises:
        ValueError: if the form is unknown or this machine does not support it, no layer is packed,
            or a packed layer is offloaded.
        TypeError: if the model is not a module.
    """
    require_model(model, nn.Module)
    named = {name: each for name, each in model.named_modules() if isinstance(each, PackedLayer)}
    layers = list(named.values())
    if form is not None and form not in dense.FORMS:
        known = ", ".join(map(repr, dense.FORMS))
        raise ValueError(f"invalid form: got {form!r}, expected one of {known}, or None")
    if not layers:
        raise ValueError(
            f"optimize_for_inference: {type(model).__name__} has no packed layer; compress it "
            "first with quantize_model or QuantNoiseTrainer.compress, or load a compressed model"
        )
    require_in_memory(
        ((name, tensor) for name, each in named.items() for tensor in each.state_dict().values()),
        "must be in memory to be decoded once; load the model without offloading, or use it as it "
        "is",
    )
    if form in (None, "bf16") and not has_bf16_products(layers[0].weight_indices.device):
        if form is not None:
            logger.warning(
                "form 'bf16' is slow on this machine, which has no instructions for bfloat16; "
                "'float32' is faster"
            )
        form = form or "float32"
    form = form or "bf16"
    if form == "int8" and not (int8.is_available() and all(_is_on_cpu(layer) for layer in layers)):
        raise ValueError(
            "invalid form: got 'int8', which needs a model on a CPU with int8 instructions "
            "(AVX-512 VNNI); use 'bf16' or 'float32'"
        )
    restore_packed(model)
    model.eval()
    made: Made = {}  # layers that share a weight
    try:
        for layer in layers:
            if not known_layer_type(layer).is_table:
                _add_dense(layer, form, made)
    except BaseException:  # out of memory
        _drop_dense(model)
        raise
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vars(model)[_TRAINED] = trained, has_adapters(model)
    model.requires_grad_(False)
    return model


def restore_packed(model: Model) -> Model:
    """Undo :func:`optimize_for_inference` in place, and return the model.

    The model stays in eval mode. A model that is not optimized is returned unchanged. If it has got
    adapters since, the parameters below them stay frozen.
    """
    _drop_dense(model)
    for module in model.modules():  # parts may have been optimized before the model was
        trained, had_adapters = vars(module).pop(_TRAINED, ((), False))
        if had_adapters or not has_adapters(module):
            for parameter in trained:
                parameter.requires_grad_()
    return model


def _is_on_cpu(layer: Any) -> bool:
    return bool(layer.weight_indices.device.type == "cpu")


def _add_dense(layer: Any, form: str, made: Made) -> None:
    """Give a layer its decoded weight, which layers of the same codes and bias share."""
    own = layer.decode_rows(slice(0, 1)).dtype
    dtype = dense.FORMS[form] if type(layer).original_class in (nn.Linear, Conv1D) else own
    key = id(layer.weight_indices), id(layer.bias), dtype
    if key not in made:
        made[key] = dense.dense_weight(layer, dtype)
    for name, value in made[key].items():
        if isinstance(value, Tensor):
            layer.register_buffer(name, value, persistent=False)
        else:
            setattr(layer, name, value)
    layer.dense_form = "weight" if dtype == own else form


def _drop_dense(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, PackedLayer) and layer.dense_form is not None:
            for name in dense.BUFFERS:
                if hasattr(layer, name):
                    delattr(layer, name)
            del layer.dense_form
