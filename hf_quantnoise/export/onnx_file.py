"""ONNX: a packed encoder for onnxruntime, whose file holds codes and codebooks.

The graph decodes where it computes: ``Gather(codebook, codes)`` before a product, and a table
gathers the codes of the looked-up rows only. The exporter would rather have the decoding done once
and dense weights in the file; :func:`_may_fold` keeps it from that.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling import PackedLayer, packed_layers
from ..modeling.packed import PREFIX
from ..quantizers.product import ProductQuantizer
from .checks import require_packed

FILE_NAME = "model.onnx"
# What torch's exporter says of its own workings, and nobody who exports can act on: (kind, regex).
# Axes have one name in several inputs on purpose.
_IDLE_WARNINGS = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, r"# The axis name: (batch|length) will not be used"),
)
_IDLE_LOGGER, _IDLE_WORDS = (
    "torch.onnx._internal.exporter._registration", "torchvision is not installed. Skipping",
)  # fmt: skip


@dataclass(frozen=True)
class OnnxExport:
    """What :func:`export_onnx` wrote.

    Attributes:
        folder: where it is: ``model.onnx``, and ``config.json`` for labels and sizes.
        inputs, outputs: names in the graph, in order.
        disk_bytes: size of ``model.onnx``.
    """

    folder: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    disk_bytes: int

    @property
    def file(self) -> Path:
        """The ONNX file."""
        return self.folder / FILE_NAME


class _AsStored:
    """Mixin of a packed layer whose state is held as it is stored, and read in every forward."""

    _stored: ProductQuantizer

    @property
    def state(self) -> dict[str, Tensor]:
        """The state in its working form and dtype."""
        names = self._stored.state_spec(1, 1)
        read = self._stored.from_storage({key: getattr(self, PREFIX + key) for key in names})
        return {key: tensor.to(self._dtype) for key, tensor in read.items()}


class _Forward(nn.Module):
    """A model as a function of tensors alone, in order."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, tensors, strict=True))
        found = self.model(**given, return_dict=True)
        return tuple(found[name] for name in self.outputs)


@torch.no_grad()
def export_onnx(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    inputs: Mapping[str, Tensor] | None = None,
) -> OnnxExport:
    """Writes a packed encoder as an ONNX file, with any batch size and length.

    Args:
        model: a model packed by this package, of one forward: a classifier, a tagger, an encoder.
        folder: where to write; made if it is not there.
        inputs: an example of what goes in, by name; its first dimension is the batch, the second
            of an integer tensor the length. Default: ids, mask and (where the model knows several)
            token types, or pixels of the size that the config names.

    Returns:
        What was written.

    Raises:
        ImportError: if ``onnx`` and ``onnxscript`` are not installed.
        ValueError: if the model is not packed, generates token by token, or needs ``inputs``.
    """
    require_packed(model, "export_onnx")
    _require_one_forward(model)
    optimizer = _onnxscript().optimizer
    plain = _held_as_stored(model)
    inputs = dict(inputs or _example(model))
    outputs = tuple(
        name
        for name, value in plain(**inputs, return_dict=True).items()
        if isinstance(value, Tensor)
    )
    with _quiet():
        program = torch.onnx.export(
            _Forward(plain, tuple(inputs), outputs).eval(),
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,  # it would fold the decoding into dense weights
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(tuple(_free_axes(tensor) for tensor in inputs.values()),),
            custom_translation_table={torch.ops.aten.__rshift__.Tensor: _shift_right},
        )
    optimizer.optimize_ir(program.model, should_fold=_may_fold)
    _strip(program.model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    program.save(folder / FILE_NAME)
    config = deepcopy(model.config)
    del config.quantization_config
    config.save_pretrained(folder)
    size = (folder / FILE_NAME).stat().st_size
    return OnnxExport(folder, tuple(inputs), outputs, size)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what is named above; all else that is said comes through."""

    def is_said(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_IDLE_WORDS)

    logger = logging.getLogger(_IDLE_LOGGER)
    logger.addFilter(is_said)
    try:
        with warnings.catch_warnings():
            for kind, words in _IDLE_WARNINGS:
                warnings.filterwarnings("ignore", words, kind)
            yield
    finally:
        logger.removeFilter(is_said)


def _onnxscript():
    try:
        import onnx  # noqa: F401  # torch needs it to write
        import onnxscript.optimizer
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs {error.name}: pip install 'hf-quantnoise[onnx]'"
        ) from error
    return onnxscript


def _require_one_forward(model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder or model.can_generate():
        raise ValueError(
            f"export_onnx: {type(model).__name__} generates token by token, with a cache that the "
            "graph would have to hold; only models of one forward are exported, e.g. "
            "AutoModelForSequenceClassification"
        )


def _held_as_stored(model: PreTrainedModel) -> PreTrainedModel:
    """A copy, in eval mode, whose packed layers hold their state in the dtypes of a saved file."""
    plain = deepcopy(model).eval()
    held: dict[int, dict[str, nn.Parameter]] = {}
    for _, layer in packed_layers(plain):
        key = id(layer.weight_indices)  # tied layers go on sharing one set
        if key not in held:
            state = {name: tensor.detach() for name, tensor in layer.state.items()}
            held[key] = {
                PREFIX + name: nn.Parameter(tensor, False)
                for name, tensor in layer.quantizer.to_storage(state).items()
            }
        _hold(layer, held[key])
    return plain


def _hold(layer: PackedLayer, tensors: dict[str, nn.Parameter]) -> None:
    layer._stored, layer._dtype = layer.quantizer, next(iter(layer.state.values())).dtype
    if isinstance(layer.quantizer, ProductQuantizer):
        # What is read from storage is rounded already.
        layer.quantizer = replace(layer.quantizer, codebook_bits=32)
    for name, tensor in tensors.items():
        layer.register_parameter(name, tensor)
    layer.__class__ = type(type(layer).__name__, (_AsStored, type(layer)), {})


def _example(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two for the graph to be traced on."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    if model.main_input_name == "input_ids":
        ids = (torch.arange(16) % config.vocab_size).view(2, 8)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1:
            batch["token_type_ids"] = torch.zeros_like(ids)
        return {name: tensor.to(model.device) for name, tensor in batch.items()}
    size, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
    if model.main_input_name == "pixel_values" and isinstance(size, int) and channels:
        pixels = torch.zeros(2, channels, size, size, dtype=model.dtype, device=model.device)
        return {"pixel_values": pixels}
    raise ValueError(
        f"export_onnx: {type(model).__name__} takes {model.main_input_name}, of a shape that its "
        "config does not say; give an example batch, inputs={name: tensor}"
    )


def _free_axes(tensor: Tensor) -> dict[int, str]:
    is_tokens = not tensor.is_floating_point() and tensor.dim() > 1
    return {0: "batch", 1: "length"} if is_tokens else {0: "batch"}


def _shift_right(numbers, places):
    """uint8 >> uint8, which torch 2.13 has no translation for."""
    return _onnxscript().opset18.BitShift(numbers, places, direction="RIGHT")


def _may_fold(node) -> bool | None:
    """False for what reads codes or codebooks, None (by size) for the rest. Folding needs constant
    inputs, so all that is decoded from them stays too."""
    names = (value.name or "" for value in node.inputs if value is not None)
    packed = any(name.rpartition(".")[2].startswith(PREFIX) for name in names)
    return False if packed else None


def _strip(program) -> None:
    """Takes out where in Python each node came from: it weighs more than small weights do."""
    program.metadata_props.clear()
    for node in program.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in program.graph.initializers.values():
        value.metadata_props.clear()
