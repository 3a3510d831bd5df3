"""Export to AQLM checkpoints, which transformers loads with the ``aqlm`` package.

AQLM (Egiazarian et al., 2024) stores the weight of a ``Linear`` as codes into additive codebooks
over groups of inputs, with one scale per output. With groups of one output this is our product
quantization with ``row_scale`` and ``n_codebooks``; only the tensor names differ. AQLM has one
setting per model and supports ``nn.Linear`` only: all other layers are written dense and reported.
"""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AqlmConfig, PreTrainedModel

from ..argument_checks import require_output_folder
from ..compat import init_weights_function, should_convert_module
from ..compat.peft import has_adapters
from ..files.model_folders import replaced_model
from ..hub.processing import save_processing
from ..modeling import PackedLayer, packed_layers
from ..quantizers.product import ProductQuantizer
from .checks import require_packed


class AqlmSetting(NamedTuple):
    """The setting shared by all AQLM layers of a model; field names are those of its config."""

    in_group_size: int
    num_codebooks: int
    nbits_per_codebook: int

    def __str__(self) -> str:
        size, books, bits = self
        return f"block size {size} with {books} codebook{'s' * (books > 1)} of {bits} bits"


@dataclass(frozen=True)
class AqlmExport:
    """Result of :func:`export_aqlm`.

    Attributes:
        folder: the checkpoint's folder.
        setting: group size, number of codebooks and bits of the exported layers.
        layers: names of the layers that are stored as codes.
        dense: name of each packed layer that was written dense -> the reason.
        disk_bytes: size of the safetensors files.
    """

    folder: Path
    setting: AqlmSetting
    layers: tuple[str, ...]
    dense: dict[str, str] = field(default_factory=dict)
    disk_bytes: int = 0


def aqlm_parameters(layer: PackedLayer) -> nn.ParameterDict:
    """Return the parameters of a packed layer in AQLM's layout.

    Returns:
        ``codes``, shape (rows, columns / block_size, codebooks), int8 up to 8 bits, else int16;
        codes c >= 2^(bits - 1) are stored as c - 2^bits. ``codebooks``, shape (codebooks, 2^bits,
        1, block_size), padded with zeros; float16 if ``codebook_bits=16``. ``scales``, shape
        (rows, 1, 1, 1), float16; ones without ``row_scale``. ``bias``, if the layer has one.
    """
    quantizer: Any = layer.quantizer  # a ProductQuantizer
    state = {key: tensor.detach() for key, tensor in layer.state.items()}
    bits, n_books = quantizer.code_bits, quantizer.codes_per_block
    # The inverse of aqlm.utils.unpack_int_data, which reads codes modulo 2^bits.
    codes = layer.codes().int()
    codes = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    codes = codes.to(torch.int8 if bits <= 8 else torch.int16)
    books = quantizer.centroids(state).view(n_books, quantizer.n_centroids, 1, -1)
    padding = 2**bits - quantizer.n_centroids
    books = torch.nn.functional.pad(books, (0, 0, 0, 0, 0, padding))
    scales = quantizer.scales(state) if quantizer.row_scale else books.new_ones(layer.rows, 1)
    half = torch.float16
    tensors = {
        "codes": codes.view(layer.rows, -1, n_books),
        "codebooks": books.to(half) if quantizer.codebook_bits == 16 else books,
        "scales": scales.to(half).view(-1, 1, 1, 1),
    }
    tensors |= {} if layer.bias is None else {"bias": layer.bias}
    return nn.ParameterDict(
        {name: nn.Parameter(tensor.contiguous(), False) for name, tensor in tensors.items()}
    )


@torch.no_grad()
def export_aqlm(model: PreTrainedModel, folder: str | os.PathLike) -> AqlmExport:
    """Export a packed model as an AQLM checkpoint.

    The checkpoint uses the setting that covers most weights. Layers with another setting,
    embeddings, convolutions and tied heads are written dense. The model is not changed.

    Args:
        model: a model packed by this package.
        folder: output folder; created if it does not exist.

    Returns:
        The setting, the layers stored as codes, and the reason for each dense layer.

    Raises:
        ValueError: if the model is not packed, has adapters, quantizes activations (AQLM does not),
            or has no layer that fits AQLM's layout.
    """
    require_packed(model, "export_aqlm")
    _require_no_adapters(model)
    folder = Path(require_output_folder("folder", folder))
    layers_by_setting, dense = _group_by_setting(model)
    if not layers_by_setting:
        reason = Counter(dense.values()).most_common(1)[0][0]
        name = next(name for name in dense if dense[name] == reason)
        raise ValueError(
            f"export_aqlm: no layer fits AQLM's layout, e.g. {name} ({reason}); quantize Linear "
            "layers with one setting, e.g. IPQConfig(block_size=8, n_centroids=256)"
        )
    setting = max(
        layers_by_setting,
        key=lambda key: sum(
            layer.rows * layer.columns for layer in layers_by_setting[key].values()
        ),
    )
    names = tuple(layers_by_setting.pop(setting))
    for other, layers in layers_by_setting.items():
        reason = f"AQLM has one setting per model, here {setting}, not {other}"
        dense.update(dict.fromkeys(layers, reason))
    exported: Any = deepcopy(model)
    for name in names:
        exported.set_submodule(name, aqlm_parameters(exported.get_submodule(name)))
    exported = exported.dequantize()
    exported.config.quantization_config = AqlmConfig(
        **setting._asdict(), linear_weights_not_to_quantize=_dense_patterns(exported, names)
    )
    with replaced_model(folder) as part:
        exported.save_pretrained(part)
        save_processing(model, part, os.fspath(folder))
    disk_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return AqlmExport(folder, setting, names, dense, disk_bytes)


def _require_no_adapters(model: PreTrainedModel) -> None:
    """Raise a ``ValueError`` if the model has PEFT adapters, which ``save_pretrained`` is for."""
    if has_adapters(model):
        raise ValueError(
            f"export_aqlm: {type(model).__name__} has PEFT adapters, which AQLM checkpoints cannot "
            "hold; export the model without them (peft_model.unload(), or load it again), or "
            "dequantize it, merge them, and quantize the merged model"
        )


def _group_by_setting(
    model: PreTrainedModel,
) -> tuple[dict[AqlmSetting, dict[str, PackedLayer]], dict[str, str]]:
    """Return setting -> layers that AQLM can store with it, and layer -> reason for the others."""
    tied = _tied_layers(model)
    layers_by_setting: dict[AqlmSetting, dict[str, PackedLayer]] = defaultdict(dict)
    dense: dict[str, str] = {}
    for name, layer in packed_layers(model):
        if layer.activation_bits is not None:
            raise ValueError(
                f"export_aqlm: {name} has activation_bits={layer.activation_bits}, which AQLM does "
                "not support; quantize with activation_bits=None"
            )
        if (reason := _reason_unsupported(model, name, layer, tied)) is not None:
            dense[name] = reason
            continue
        quantizer = layer.quantizer
        setting = AqlmSetting(quantizer.block_size, quantizer.codes_per_block, quantizer.code_bits)
        layers_by_setting[setting][name] = layer
    return layers_by_setting, dense


def _reason_unsupported(
    model: PreTrainedModel, name: str, layer: PackedLayer, tied: set[str]
) -> str | None:
    original_class = type(layer).original_class
    if original_class is not nn.Linear:
        return f"AQLM supports Linear layers only, not {original_class.__name__}"
    if not isinstance(layer.quantizer, ProductQuantizer):
        return f"AQLM does not support {layer.quantizer.short_name}"
    if name in tied:
        return "it is tied to another layer, which AQLM does not support"
    if _reads_weight(model, name):
        return "the model's code reads the weight directly, which AQLM layers do not have"
    return None


def _tied_layers(model: PreTrainedModel) -> set[str]:
    """Return the packed layers that share their codes with another one.

    Layers shared by ``share_layers`` are not included: an AQLM checkpoint stores a copy for each.
    """
    shared = tuple(f"{name}." for name in model.config.quantization_config.shared_layers)
    holders = defaultdict(list)
    for name, layer in packed_layers(model):
        if not name.startswith(shared):
            holders[id(layer.weight_indices)].append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _reads_weight(model: PreTrainedModel, name: str) -> bool:
    """Return whether the parent module or the model's ``_init_weights`` reads the layer's weight.

    T5 does both, so that its layers cannot be replaced by ones without ``weight``.
    """
    parent, _, leaf = name.rpartition(".")
    leaf = re.escape(leaf)
    patterns = {
        type(model.get_submodule(parent)): rf"\bself\.{leaf}\.weight\b",
        init_weights_function(model): rf"\bmodule\.(\w+\.)*{leaf}\.weight\b",
    }
    return any(re.search(pattern, _source(code)) for code, pattern in patterns.items())


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # defined interactively or in C
        return ""


def _dense_patterns(model: nn.Module, exported: tuple[str, ...]) -> list[str]:
    """Return ``linear_weights_not_to_quantize``: the Linear layers that stay dense.

    transformers matches each entry as a regex, a prefix and a suffix. A name that would also match
    an exported layer is therefore written as a regex for the full name.
    """
    patterns = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_ambiguous = any(not should_convert_module(other, [name]) for other in exported)
            patterns.append(rf"^{re.escape(name)}$" if is_ambiguous else name)
    return patterns
