"""Export of packed encoders to ONNX files that hold codes and codebooks.

The graph decodes weights where they are used: ``Gather(codebook, codes)`` before each product, and
an embedding gathers the codes of the looked-up rows only. By default the exporter would fold the
decoding into dense weights; :func:`_may_fold` prevents that.
"""

from __future__ import annotations

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
from ..modeling import packed_layers
from ..modeling.packed import PREFIX
from ..quantizers import Quantizer
from .checks import require_packed
from .onnx_folder import onnx_path, save_companions
from .onnx_inputs import dynamic_axes, example_inputs

# Messages about the internals of torch's exporter, on which the user cannot act. The axis names
# are used by several inputs on purpose.
_IGNORED_WARNINGS = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, r"# The axis name: (batch|choices|length) will not be used"),
)
_EXPORTER_LOGGER = "torch.onnx._internal.exporter._registration"
_IGNORED_LOG = "torchvision is not installed. Skipping"


@dataclass(frozen=True)
class OnnxExport:
    """Result of :func:`export_onnx`.

    Attributes:
        folder: the folder, in the layout of :mod:`.onnx_folder`.
        dtype: name of the form in transformers.js, e.g. ``"fp32"``.
        inputs, outputs: names in the graph, in order.
    """

    folder: Path
    dtype: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def file(self) -> Path:
        """The ONNX file."""
        return self.folder / onnx_path(self.dtype)

    @property
    def disk_bytes(self) -> int:
        """Size of the ONNX file."""
        return self.file.stat().st_size


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

    The folder is one that transformers.js and optimum load: ``onnx/model.onnx``, ``config.json``,
    and the tokenizer or image processor that is known for the model.

    Args:
        model: a packed model that runs in one forward pass, e.g. a classifier, tagger or encoder.
        folder: output folder; created if it does not exist.
        inputs: example inputs by name. The first dimension is the batch, the second one of integer
            tensors and waveforms (batch, samples) the length; both are dynamic. So are all three of
            multiple choice (batch, choices, length). Other sizes are fixed.
            Default: input ids, attention mask and, if the model has several, token types; or
            pixels or spectrograms of the size in the config; or a waveform.

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
    if model.can_generate():
        raise ValueError(
            f"export_onnx: {type(model).__name__} has a decoder that generates token by token, and "
            "a graph with a cache is not supported; export a model that runs in one forward pass, "
            "e.g. from AutoModelForSequenceClassification"
        )
    onnxscript = _onnxscript()
    stored = _with_stored_state(model)
    inputs = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in (inputs or example_inputs(stored)).items()
    }
    call = "pass a batch that it takes, inputs={name: tensor}"
    outputs = run_batch(stored, {**inputs, "return_dict": True}, "inputs", call)
    outputs = tuple(name for name, value in outputs.items() if isinstance(value, Tensor))
    program = _traced(stored, inputs, outputs)
    onnxscript.optimizer.optimize_ir(program.model, should_fold=_may_fold)
    _strip_metadata(program.model)
    dtype = "fp32"
    with replaced_model(folder) as part:
        path = os.path.join(part, onnx_path(dtype))
        os.makedirs(os.path.dirname(path))
        program.save(path)
        save_companions(model, part, dtype, os.fspath(folder))
    return OnnxExport(folder, dtype, tuple(inputs), outputs)


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
            dynamic_shapes=(tuple(dynamic_axes(name, tensor) for name, tensor in inputs.items()),),
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
    nn.Module.float(model)  # past transformers' check; onnxruntime's CPU kernels lack bfloat16
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
