"""AQLM's layout: what plain transformers with the ``aqlm`` package loads, without this package.

AQLM (Egiazarian et al., 2024) stores the weight of a ``Linear`` as codes into one or more additive
codebooks over groups of inputs, times a scale for each output. With groups of one output that is
product quantization with ``row_scale``, and with two codebooks ``n_codebooks=2``: the tensors are
ours under other names. AQLM has one setting for a whole model and packs nothing but ``nn.Linear``,
so what is of another setting or type is written dense, and said to be.
"""

from __future__ import annotations

import inspect
import os
import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AqlmConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..modeling import PackedLayer, packed_layers
from ..quantizers.product import ProductQuantizer
from .checks import require_packed

WOULD_FIT = (
    "AQLM takes Linear layers by product quantization, all with one block size, one number of "
    "centroids up to 65,536 and one number of codebooks, e.g. "
    "IPQConfig(block_size=8, n_centroids=256), and no activation_bits"
)


class AqlmSetting(NamedTuple):
    """What AQLM has once for all layers of a model, by the names of its config."""

    in_group_size: int
    num_codebooks: int
    nbits_per_codebook: int


@dataclass(frozen=True)
class AqlmExport:
    """What :func:`export_aqlm` wrote.

    Attributes:
        folder: where it is.
        setting: group size, codebooks and bits of all exported layers.
        layers: names of the layers that are written as codes.
        dense: name of each packed layer that is written dense -> why.
        disk_bytes: size of the safetensors files.
    """

    folder: Path
    setting: AqlmSetting
    layers: tuple[str, ...]
    dense: dict[str, str] = field(default_factory=dict)
    disk_bytes: int = 0


class AqlmTensors(nn.Module):
    """The tensors of ``aqlm.QuantizedLinear``; it only holds them."""

    def __init__(self, layer: PackedLayer) -> None:
        super().__init__()
        tensors = aqlm_tensors(layer)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", layer.bias)


def aqlm_tensors(layer: PackedLayer) -> dict[str, Tensor]:
    """A packed layer's weight in AQLM's layout.

    Returns:
        ``codes``, shape (rows, columns / block_size, codebooks), int8 up to 8 bits and int16 above,
        a code c from 2^(bits - 1) on as c - 2^bits; ``codebooks``, shape (codebooks, 2^bits, 1,
        block_size), filled up with zeros; ``scales``, shape (rows, 1, 1, 1), ones where rows have
        no scale. Floats are in the precision they are stored in here, or the weight's own.
    """
    quantizer: ProductQuantizer = layer.quantizer
    state = {key: tensor.detach() for key, tensor in layer.state.items()}
    bits, n_books = quantizer.code_bits, quantizer.codes_per_block
    signed = torch.int8 if bits <= 8 else torch.int16
    # As aqlm.utils.pack_int_data: it reads them modulo 2^bits.
    codes = layer.codes().int()
    codes = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(signed)
    books = quantizer.centroids(state).view(n_books, quantizer.n_centroids, 1, -1)
    padding = 2**bits - quantizer.n_centroids
    books = torch.nn.functional.pad(books, (0, 0, 0, 0, 0, padding))
    scales = quantizer.scales(state) if quantizer.row_scale else books.new_ones(layer.rows, 1)
    half = torch.float16
    return {
        "codes": codes.view(layer.rows, -1, n_books).contiguous(),
        "codebooks": (books.to(half) if quantizer.codebook_bits == 16 else books).contiguous(),
        "scales": scales.to(half).view(-1, 1, 1, 1).contiguous(),
    }


@torch.no_grad()
def export_aqlm(model: PreTrainedModel, folder: str | os.PathLike) -> AqlmExport:
    """Writes a packed model as an AQLM checkpoint.

    The setting that most weights have becomes the checkpoint's; layers of another setting, tables,
    convolutions and tied heads are written dense. The model itself is left as it is.

    Args:
        model: a model packed by this package.
        folder: where to write config and safetensors; made if it is not there.

    Returns:
        What was written how.

    Raises:
        ValueError: if the model is not packed, rounds what enters its layers (AQLM does not), or
            no layer fits; the message says what would.
    """
    require_packed(model, "export_aqlm")
    fitting, dense = _sort_out(model)
    if not fitting:
        raise ValueError(f"export_aqlm: no layer fits AQLM's layout. {_listed(dense)}\n{WOULD_FIT}")
    setting = max(fitting, key=lambda key: sum(_numbers(layer) for layer in fitting[key].values()))
    for other, layers in fitting.items():
        if other != setting:
            reason = (
                f"AQLM has one setting for a model, here {_words(setting)}, not {_words(other)}"
            )
            dense.update(dict.fromkeys(layers, reason))
    names = tuple(fitting[setting])
    plain = _with_aqlm_tensors(model, names)
    plain.config.quantization_config = AqlmConfig(
        **setting._asdict(), linear_weights_not_to_quantize=_patterns(plain, names)
    )
    plain.save_pretrained(folder)
    folder = Path(folder)
    disk_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return AqlmExport(folder, setting, names, dense, disk_bytes)


def _numbers(layer: PackedLayer) -> int:
    return layer.rows * layer.columns


def _words(setting: AqlmSetting) -> str:
    size, books, bits = setting
    return f"blocks of {size} with {books} codebook{'s' * (books > 1)} of {bits} bits"


def _listed(dense: dict[str, str]) -> str:
    """Each reason once, with the first of its layers."""
    names = defaultdict(list)
    for name, reason in dense.items():
        names[reason].append(name)
    return "; ".join(
        f"{found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}: {reason}"
        for reason, found in names.items()
    )


def _sort_out(
    model: PreTrainedModel,
) -> tuple[dict[AqlmSetting, dict[str, PackedLayer]], dict[str, str]]:
    """The packed layers by the setting they would need; and those that fit none, with why."""
    tied = _tied_elsewhere(model)
    fitting: dict[AqlmSetting, dict[str, PackedLayer]] = defaultdict(dict)
    dense: dict[str, str] = {}
    for name, layer in packed_layers(model):
        if layer.activation_bits is not None:
            raise ValueError(
                f"export_aqlm: what enters {name} is rounded to {layer.activation_bits} bits, "
                "which AQLM does not do; quantize with activation_bits=None"
            )
        if (reason := _misfit(model, name, layer, tied)) is not None:
            dense[name] = reason
            continue
        quantizer = layer.quantizer
        setting = AqlmSetting(quantizer.block_size, quantizer.codes_per_block, quantizer.code_bits)
        fitting[setting][name] = layer
    return fitting, dense


def _misfit(model: nn.Module, name: str, layer: PackedLayer, tied: set[str]) -> str | None:
    """Why a packed layer cannot be AQLM's; None where it can."""
    original_class = type(layer).original_class
    if original_class is not nn.Linear:
        return f"AQLM packs Linear layers only, not {original_class.__name__}"
    if not isinstance(layer.quantizer, ProductQuantizer):
        return f"AQLM has no {layer.quantizer.short_name}"
    if name in tied:
        return "it is tied to another layer, and AQLM ties nothing"
    if _weight_is_read(model, name):
        return "its model reads the weight itself, which an AQLM layer does not have"
    return None


def _tied_elsewhere(model: PreTrainedModel) -> set[str]:
    """Packed layers that hold the codes of another: not those of ``share_layers``, each of which
    an AQLM checkpoint can hold anew."""
    shared = tuple(f"{name}." for name in model.config.quantization_config.shared_layers)
    holders = defaultdict(list)
    for name, layer in packed_layers(model):
        if not name.startswith(shared):
            holders[id(layer.weight_indices)].append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _weight_is_read(model: nn.Module, name: str) -> bool:
    """Whether code above a layer names the layer's weight: the module that holds it, or what
    initialises the model while it is loaded (both in T5)."""
    parent, _, leaf = name.rpartition(".")
    leaf = re.escape(leaf)
    places = {
        type(model.get_submodule(parent)): rf"\bself\.{leaf}\.weight\b",
        type(model)._init_weights: rf"\bmodule\.(\w+\.)*{leaf}\.weight\b",
    }
    return any(re.search(pattern, _source(code)) for code, pattern in places.items())


def _source(code: object) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # not read from a file
        return ""


def _with_aqlm_tensors(model: PreTrainedModel, names: tuple[str, ...]) -> PreTrainedModel:
    """A copy with AQLM's tensors in some layers and dense weights in all others."""
    plain = deepcopy(model)
    for name in names:
        plain.set_submodule(name, AqlmTensors(plain.get_submodule(name)))
    return plain.dequantize()


def _patterns(model: nn.Module, exported: tuple[str, ...]) -> list[str]:
    """``linear_weights_not_to_quantize``: the Linear layers that stay dense.

    transformers reads the entries as regexes, prefixes and suffixes: a name that would take an
    exported layer with it is written as a regex for the whole name.
    """
    patterns = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            takes_more = any(not should_convert_module(other, [name]) for other in exported)
            patterns.append(rf"^{re.escape(name)}$" if takes_more else name)
    return patterns
