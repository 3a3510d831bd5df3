"""Export of packed encoders to ONNX files that hold codes and codebooks.

The graph decodes weights where they are used: ``Gather(codebook, codes)`` before each product, and
an embedding gathers the codes of the looked-up rows only. By default the exporter would fold the
decoding into dense weights; :func:`_may_fold` prevents that.
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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..argument_checks import require_instance, require_output_folder, require_tensors, run_batch
from ..files.model_folders import replaced_model
from ..hub.processing import save_processing
from ..modeling import packed_layers
from ..modeling.packed import PREFIX
from ..quantizers import Quantizer
from .checks import require_packed

FILE_NAME = "model.onnx"
# Messages about the internals of torch's exporter, on which the user cannot act. The axis names
# are used by several inputs on purpose.
_IGNORED_WARNINGS = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, r"# The axis name: (batch|choices|length) will not be used"),
)
_EXPORTER_LOGGER = "torch.onnx._internal.exporter._registration"
_IGNORED_LOG = "torchvision is not installed. Skipping"

_TOKENS = {"input_ids", "attention_mask", "token_type_ids"}
# Inputs of models that read more than text, or more than pixels.
_OTHER_INPUTS = {
    *("bbox", "image", "image_embeds", "input_features", "input_ids", "input_values"),
    *("pixel_values", "visual_embeds", "visual_feats"),
}


@dataclass(frozen=True)
class OnnxExport:
    """Result of :func:`export_onnx`.

    Attributes:
        folder: the folder with ``model.onnx``, and ``config.json`` for labels and sizes.
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


class _StoredState:
    """Mixin for packed layers that hold their state in storage format and convert it in forward."""

    _storage_quantizer: Quantizer
    _dtype: torch.dtype

    @property
    def state(self) -> dict[str, Tensor]:
        names = self._storage_quantizer.state_spec(1, 1)
        stored = {key: getattr(self, PREFIX + key) for key in names}
        state = self._storage_quantizer.from_storage(stored)
        integers = self._storage_quantizer.integers
        return {k: t if k in integers else t.to(self._dtype) for k, t in state.items()}


class _PositionalForward(nn.Module):
    """Wrap a model so that it takes and returns tensors by position."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output = self.model(**dict(zip(self.inputs, tensors, strict=True)), return_dict=True)
        return tuple(output[name] for name in self.outputs)


@torch.no_grad()
def export_onnx(
    model: PreTrainedModel, folder: str | os.PathLike, inputs: Mapping[str, Tensor] | None = None
) -> OnnxExport:
    """Export a packed encoder as an ONNX file with dynamic batch size and sequence length.

    Args:
        model: a packed model that runs in one forward pass, e.g. a classifier, tagger or encoder.
        folder: output folder; created if it does not exist.
        inputs: example inputs by name. The first dimension is the batch, the second one of integer
            tensors and waveforms (batch, samples) the length; both are dynamic. So are all three of
            multiple choice (batch, choices, length). Other sizes are fixed.
            Default: input ids, attention mask and, if the model has several, token types; or
            pixels of the image size in the config.

    Returns:
        The folder, the names of inputs and outputs, and the file's size.

    Raises:
        ImportError: if ``onnx`` or ``onnxscript`` is not installed.
        ValueError: if the model is not packed, generates token by token, needs ``inputs``, or does
            not run on them.
    """
    require_packed(model, "export_onnx")
    folder = Path(require_output_folder("folder", folder))
    if inputs is not None:
        expected, way_out = "a dict of tensors by name", "pass e.g. {'input_ids': ids}"
        require_instance("inputs", inputs, Mapping, expected, way_out)
        require_tensors("inputs", inputs)
    if model.config.is_encoder_decoder or model.can_generate():
        raise ValueError(
            f"export_onnx: {type(model).__name__} has a decoder that generates token by token, and "
            "a graph with a cache is not supported; export a model that runs in one forward pass, "
            "e.g. from AutoModelForSequenceClassification"
        )
    onnxscript = _onnxscript()
    stored = _with_stored_state(model)
    inputs = dict(inputs or _example_inputs(model))
    call = "pass a batch that it takes, inputs={name: tensor}"
    outputs = run_batch(stored, {**inputs, "return_dict": True}, "inputs", call)
    outputs = tuple(name for name, value in outputs.items() if isinstance(value, Tensor))
    program = _traced(stored, inputs, outputs)
    onnxscript.optimizer.optimize_ir(program.model, should_fold=_may_fold)
    _strip_metadata(program.model)
    config = deepcopy(model.config)
    del config.quantization_config
    with replaced_model(folder) as part:
        program.save(os.path.join(part, FILE_NAME))
        config.save_pretrained(part)
        save_processing(model, part, os.fspath(folder))
    return OnnxExport(folder, tuple(inputs), outputs, (folder / FILE_NAME).stat().st_size)


def _traced(model: PreTrainedModel, inputs: dict[str, Tensor], outputs: tuple[str, ...]) -> Any:
    with _quiet_exporter():
        return torch.onnx.export(
            _PositionalForward(model, tuple(inputs), outputs).eval(),
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,  # it would fold the decoding into dense weights
            verbose=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=(tuple(_dynamic_axes(name, tensor) for name, tensor in inputs.items()),),
            custom_translation_table={torch.ops.aten.__rshift__.Tensor: _shift_right},
        )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress the messages listed above, and no others."""

    def is_relevant(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_IGNORED_LOG)

    logger = logging.getLogger(_EXPORTER_LOGGER)
    logger.addFilter(is_relevant)
    try:
        with warnings.catch_warnings():
            for category, pattern in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", pattern, category)
            yield
    finally:
        logger.removeFilter(is_relevant)


def _onnxscript() -> Any:
    try:
        import onnx  # noqa: F401  # torch needs it to write
        import onnxscript.optimizer
    except ImportError as error:
        raise ImportError(
            f"export_onnx requires {error.name}; run pip install 'hf-quantnoise[onnx]'"
        ) from error
    return onnxscript


def _with_stored_state(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in eval mode whose packed layers hold their state in the dtypes of the file."""
    model = deepcopy(model).eval()
    stored: dict[int, dict[str, nn.Parameter]] = {}
    for _, layer in packed_layers(model):
        quantizer: Any = layer.quantizer
        state = layer.state
        key = id(layer.weight_indices)  # tied layers continue to share one set of tensors
        if key not in stored:
            state = {name: tensor.detach() for name, tensor in state.items()}
            stored[key] = {
                PREFIX + name: nn.Parameter(tensor, False)
                for name, tensor in quantizer.to_storage(state).items()
            }
        layer._storage_quantizer, layer._dtype = quantizer, next(iter(state.values())).dtype
        if quantizer.has_codebook:
            # Values read from storage are already rounded.
            layer.quantizer = replace(quantizer, codebook_bits=32)
        for name, tensor in stored[key].items():
            layer.register_parameter(name, tensor)
        layer.__class__ = type(type(layer).__name__, (_StoredState, type(layer)), {})
    return model


def _example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch of two examples to trace the graph with."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    if others := _OTHER_INPUTS & parameters.keys() - {model.main_input_name}:
        raise ValueError(
            f"export_onnx: {type(model).__name__} also takes {', '.join(sorted(others))}, and a "
            "graph has the inputs of its example batch only; pass one, inputs={name: tensor}"
        )
    if model.main_input_name == "input_ids":
        shape = (2, 2, 4) if type(model).__name__.endswith("ForMultipleChoice") else (2, 8)
        ids = (torch.arange(16) % config.vocab_size).view(shape)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_type_ids" in parameters and getattr(config, "type_vocab_size", 0) > 1:
            batch["token_type_ids"] = torch.zeros_like(ids)
        return {name: tensor.to(model.device) for name, tensor in batch.items()}
    size, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
    if model.main_input_name == "pixel_values" and isinstance(size, int) and channels:
        pixels = torch.zeros(2, channels, size, size, dtype=model.dtype, device=model.device)
        return {"pixel_values": pixels}
    raise ValueError(
        f"export_onnx: the shape of {model.main_input_name} is not in the config of "
        f"{type(model).__name__}; pass an example batch, inputs={{name: tensor}}"
    )


def _dynamic_axes(name: str, tensor: Tensor) -> dict[int, str]:
    is_waveform = name == "input_values" and tensor.dim() == 2
    if tensor.dim() == 1 or (tensor.is_floating_point() and not is_waveform):
        return {0: "batch"}
    if tensor.dim() == 3 and name in _TOKENS:  # of multiple choice
        return {0: "batch", 1: "choices", 2: "length"}
    return {0: "batch", 1: "length"}


def _shift_right(values: Any, bits: Any) -> Any:
    """Translate uint8 >> uint8, which torch 2.13 does not support."""
    return _onnxscript().opset18.BitShift(values, bits, direction="RIGHT")


def _may_fold(node: Any) -> bool | None:
    """Return False for nodes that read codes or codebooks, None (decide by size) for all others.

    Only nodes with constant inputs are folded, so everything computed from these is kept too.
    """
    names = (value.name or "" for value in node.inputs if value is not None)
    is_packed = any(name.rpartition(".")[2].startswith(PREFIX) for name in names)
    return False if is_packed else None


def _strip_metadata(program: Any) -> None:
    """Remove the Python stack trace of each node, which can be larger than small weights."""
    nodes = list(program.graph.all_nodes())
    values = [*program.graph.initializers.values(), *(v for node in nodes for v in node.outputs)]
    for part in (program, *nodes, *values):
        part.metadata_props.clear()
