"""Post-training weight quantization by other libraries, saved in their formats and loaded again.

Each function gets a float32 model and the path of a file, and returns the model that was loaded
from that file, with the bytes that its weights need.
"""

from __future__ import annotations

import copy
import os

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

# The tested versions; none of these is a dependency of this package.
INSTALL = {
    "torchao": "pip install torchao==0.18.0",
    "quanto": "pip install optimum-quanto==0.2.7",
}


def torchao_model(
    model: PreTrainedModel, path: str, *, bits: int, group: int | None = None, algorithm: str
) -> tuple[PreTrainedModel, int]:
    """Quantize the weights of Linear layers and embeddings with torchao.

    On a CPU other than ARM torchao has no packed form of these weights: its file has one byte per
    weight. The bytes returned are therefore those of the packed weights, as :func:`packed_bytes`
    counts them.

    Args:
        bits: of a weight, 1 to 8.
        group: number of weights that share a scale; None: a row.
        algorithm: ``"symmetric"``, ``"asymmetric"`` (with zero points), or ``"hqq"`` (scales found
            by HQQ, no zero points).
    """
    from torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
        unflatten_tensor_state_dict,
    )
    from torchao.quantization import (
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm as Algorithm

    asymmetric = algorithm == "asymmetric"
    config = IntxWeightOnlyConfig(
        getattr(torch, f"int{bits}"),
        PerGroup(group) if group else PerAxis(0),
        MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=(
            Algorithm.HQQ_SCALE_ONLY if algorithm == "hqq" else Algorithm.AFFINE
        ),
    )
    dense = copy.deepcopy(model)
    quantize_(dense, config, lambda module, name: isinstance(module, (nn.Linear, nn.Embedding)))
    tensors, metadata = flatten_tensor_state_dict(dense.state_dict())
    save_file(tensors, path, metadata=metadata)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state, left = unflatten_tensor_state_dict(load_file(path), metadata)
    if left:
        raise ValueError(f"invalid {path}: tensors of no weight: {', '.join(left)}")
    loaded = type(model)(model.config)
    loaded.load_state_dict(state, assign=True)
    return loaded, packed_bytes(state.values(), bits)


def packed_bytes(tensors, bits: int) -> int:
    """Return the bytes of tensors if quantized weights were packed to ``bits`` bits each.

    A quantized weight takes ``ceil(bits * elements / 8)`` bytes, its scales, and its zero points
    unless all of them are 0. Other tensors count as they are. A file has a header in addition.
    """
    total = 0
    for tensor in tensors:
        if not hasattr(tensor, "qdata"):
            total += tensor.nbytes
            continue
        total += -(-bits * tensor.qdata.numel() // 8) + tensor.scale.nbytes
        total += tensor.zero_point.nbytes if tensor.zero_point.any() else 0
    return total


# The int4 kernel of quanto needs a multiple of 16 outputs and contiguous inputs.
NOT_BY_QUANTO = ["classifier", "*pooler*"]


def quanto_model(model: PreTrainedModel, path: str, *, weights: str) -> tuple[PreTrainedModel, int]:
    """Quantize the Linear layers with optimum-quanto, and store the rest in bfloat16.

    It has no quantized embedding; classifier and pooler are not quantized. int4 and int2 have
    groups of 128 and scales found by HQQ, which were closer to float32 than those of its default.

    Args:
        weights: ``"qint8"``, ``"qint4"`` or ``"qint2"``.
    """
    from optimum.quanto import HqqOptimizer, freeze, qtypes, quantization_map, quantize, requantize

    dense = copy.deepcopy(model).to(torch.bfloat16)
    optimizer = None if weights == "qint8" else HqqOptimizer()
    quantize(dense, weights=qtypes[weights], optimizer=optimizer, exclude=NOT_BY_QUANTO)
    freeze(dense)
    save_file(dense.state_dict(), path)
    loaded = type(model)(model.config).to(torch.bfloat16)
    requantize(loaded, load_file(path), quantization_map(dense), device=torch.device("cpu"))
    return loaded, os.path.getsize(path)
