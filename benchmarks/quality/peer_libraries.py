"""Post-training weight quantization by other libraries, saved in their formats and loaded again.

``torchao_model`` and ``quanto_model`` get a float32 model and the path of a file, and return the
model that was loaded from that file, with the bytes that its weights need.
"""

from __future__ import annotations

import copy
import json
import os

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

# The tested versions; none of these is a dependency of this package.
INSTALL = {
    "torchao": "pip install torchao==0.18.0",
    "quanto": "pip install optimum-quanto==0.2.7",
}


def empty_model(folder: str) -> PreTrainedModel:
    """Return a model with the class and config in a folder, with random weights."""
    config = AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0])(config).eval()


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Return name -> first name of each parameter that has several names, e.g. of a tied head."""
    first: dict[int, str] = {}
    every = list(model.named_parameters(remove_duplicate=False))
    for name, weight in every:
        first.setdefault(id(weight), name)
    return {name: first[id(weight)] for name, weight in every if first[id(weight)] != name}


def torchao_model(
    model: PreTrainedModel, path: str, *, bits: int, group: int | None = None, algorithm: str
) -> tuple[PreTrainedModel, int]:
    """Quantize with :func:`save_torchao`, and load the file.

    The bytes returned are those of the packed weights, as :func:`packed_bytes` counts them.
    """
    save_torchao(model, path, bits=bits, group=group, algorithm=algorithm)
    loaded = load_torchao(type(model)(model.config), path)
    return loaded, packed_bytes(loaded.state_dict().values(), bits)


def save_torchao(
    model: PreTrainedModel, path: str, *, bits: int, group: int | None = None, algorithm: str
) -> None:
    """Quantize the weights of Linear layers and embeddings with torchao.

    Tied weights stay dense, and so do those whose columns ``group`` does not divide.

    On a CPU other than ARM torchao has no packed form of these weights: its file has one byte per
    weight.

    Args:
        bits: of a weight, 1 to 8.
        group: number of weights that share a scale; None: a row.
        algorithm: ``"symmetric"``, ``"asymmetric"`` (with zero points), or ``"hqq"`` (scales found
            by HQQ, no zero points).
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
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
    tied = set(shared_weights(dense).values())
    tied = {id(weight) for name, weight in dense.named_parameters() if name in tied}

    def is_quantized(module: nn.Module, name: str) -> bool:
        if not isinstance(module, (nn.Linear, nn.Embedding)) or id(module.weight) in tied:
            return False
        return module.weight.shape[1] % (group or 1) == 0

    quantize_(dense, config, is_quantized)
    shared = shared_weights(dense)
    state = {name: tensor for name, tensor in dense.state_dict().items() if name not in shared}
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, path, metadata=metadata)


def load_torchao(empty: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return a model with the weights that :func:`save_torchao` wrote."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state, left = unflatten_tensor_state_dict(load_file(path), metadata)
    if left:
        raise ValueError(f"invalid {path}: tensors of no weight: {', '.join(left)}")
    for name, first in shared_weights(empty).items():
        state[name] = state[first]
    empty.load_state_dict(state, assign=True)
    empty.tie_weights()
    return empty


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


# The int4 kernel of quanto needs a multiple of 16 outputs and contiguous inputs. A head is tied to
# a table in most language models.
NOT_BY_QUANTO = ["classifier", "*pooler*", "lm_head"]
QUANTIZATION_MAP = "quantization_map.json"


def quanto_model(model: PreTrainedModel, path: str, *, weights: str) -> tuple[PreTrainedModel, int]:
    """Quantize with :func:`save_quanto`, and load the file; return the file's bytes too."""
    save_quanto(model, path, weights=weights)
    return load_quanto(type(model)(model.config), path), os.path.getsize(path)


def save_quanto(model: PreTrainedModel, path: str, *, weights: str) -> None:
    """Quantize the Linear layers with optimum-quanto, and store the rest in bfloat16.

    It has no quantized embedding; classifier, pooler and language-model head are not quantized.
    int4 and int2 have groups of 128 and scales found by HQQ, which were closer to float32 than
    those of its default. How each layer is quantized is written to another file in the folder.

    Args:
        weights: ``"qint8"``, ``"qint4"`` or ``"qint2"``.
    """
    from optimum.quanto import HqqOptimizer, freeze, qtypes, quantization_map, quantize

    dense = copy.deepcopy(model).to(torch.bfloat16)
    optimizer = None if weights == "qint8" else HqqOptimizer()
    quantize(dense, weights=qtypes[weights], optimizer=optimizer, exclude=NOT_BY_QUANTO)
    freeze(dense)
    shared = shared_weights(dense)
    save_file({n: t for n, t in dense.state_dict().items() if n not in shared}, path)
    with open(os.path.join(os.path.dirname(path), QUANTIZATION_MAP), "w") as file:
        json.dump(quantization_map(dense), file)


def load_quanto(empty: PreTrainedModel, path: str) -> PreTrainedModel:
    """Return a model with the weights that :func:`save_quanto` wrote."""
    from optimum.quanto import requantize

    with open(os.path.join(os.path.dirname(path), QUANTIZATION_MAP)) as file:
        layers = json.load(file)
    empty = empty.to(torch.bfloat16)
    # Its int8 kernel crashes on unaligned weights, which those of a memory-mapped file may be.
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    requantize(empty, state, layers, device=torch.device("cpu"))
    empty.tie_weights()
    return empty
