"""Export of packed models to ONNX files that hold codes and codebooks.

The graph decodes weights where they are used: ``Gather(codebook, codes)`` before each product, and
an embedding gathers the codes of the looked-up rows only. By default the exporter would fold the
decoding into dense weights; :func:`.onnx_graph.may_fold` prevents that.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..argument_checks import require_instance, require_output_folder, require_tensors, run_batch
from ..compat.products import has_saturating_int8_products
from ..configuration.checks import one_of
from ..files.model_folders import replaced_model
from .checks import require_packed
from .onnx_cache import example_with_past, present_of, require_decoder, with_cache
from .onnx_folder import SUFFIXES, onnx_path, save_companions
from .onnx_graph import may_fold, store_as_float16, strip_metadata
from .onnx_inputs import dynamic_axes, example_inputs, without_ones
from .onnx_int8 import int8_layers
from .onnx_storage import copy_with_stored_state

logger = logging.getLogger(__name__)

# Messages about the internals of torch's exporter, on which the user cannot act. The axis names
# are used by several inputs, or by none, on purpose.
_IGNORED_WARNINGS = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, r"# The axis name: (\w+_)?(batch_size|choices|sequence_length) will not be used"),
)
_EXPORTER_LOGGER = "torch.onnx._internal.exporter._registration"
_IGNORED_LOG = "torchvision is not installed. Skipping"
_SATURATION = (
    "this machine has no VNNI instructions, and onnxruntime's products of 8 bits saturate there "
    'unless the session has the config entry "session.x64quantprecision" = "1"'
)


@dataclass(frozen=True)
class OnnxExport:
    """Result of :func:`export_onnx`.

    Attributes:
        folder: the folder, in the layout of :mod:`.onnx_folder`.
        dtype: name of the form in transformers.js, e.g. ``"fp32"``.
        inputs, outputs: names in the graph, in order.
        not_int8: with dtype int8, why the products of some packed layers are not, by name.
    """

    folder: Path
    dtype: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    not_int8: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The ONNX file."""
        return self.folder / onnx_path(self.dtype)

    @property
    def disk_bytes(self) -> int:
        """Size of the ONNX file."""
        return self.file.stat().st_size


class _PositionalForward(nn.Module):
    """Wrap a model so that it takes and returns tensors by position."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = with_cache(dict(zip(self.inputs, tensors, strict=True)))
        output = self.model(**inputs, return_dict=True)
        named = {**output, **present_of(output)}
        return tuple(named[name] for name in self.outputs)


@torch.no_grad()
def export_onnx(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    dtype: str = "fp32",
    leftover_bits: int = 32,
) -> OnnxExport:
    """Export a packed model as an ONNX file with dynamic batch size and sequence length.

    The folder has the layout that transformers.js and optimum load: ``onnx/model.onnx``,
    ``config.json``, and the tokenizer or image processor of the model, if it is known. Decoders
    take the keys and values of earlier tokens and return those of all tokens.

    Args:
        model: a packed classifier, tagger, encoder, or decoder such as GPT-2 or Llama.
        folder: output folder; created if it does not exist.
        inputs: example inputs by name. The first dimension (the batch) is dynamic, and so are the
            second one of integer tensors and waveforms (the length), and all three of multiple
            choice (batch, choices, length). Other sizes are those of the example.
            Default: input ids, attention mask and, if the model has several, token types; or
            pixels or spectrograms of the size in the config; or a waveform. Decoders have fixed
            inputs: do not pass any.
        dtype: ``"fp32"``: weights are decoded, and products computed in float32. ``"int8"``:
            products of Linear layers are computed in 8-bit integers, which is faster and needs
            less memory; inputs, and codebooks that are not stored in 8 bits, are rounded to 8 bits.
            On x86 CPUs without VNNI, onnxruntime's 8-bit products saturate silently unless the
            session has the config entry ``session.x64quantprecision`` = "1"; exporting on such a
            machine logs a warning.
        leftover_bits: 16 rounds dense matrices to float16 in the file. Matrices whose values fit
            float16 exactly are always stored in it.

    Returns:
        The folder, the names of inputs and outputs, and the layers without int8 products.

    Raises:
        ImportError: if ``onnx`` or ``onnxscript`` is not installed.
        ValueError: if an option is invalid, or the model is not packed, keeps a state other than
            keys and values, needs ``inputs``, or does not run on them.
    """
    require_packed(model, "export_onnx")
    folder = Path(require_output_folder("folder", folder))
    one_of(SUFFIXES)("dtype", dtype)
    one_of((32, 16))("leftover_bits", leftover_bits)
    if inputs is not None:
        expected, way_out = "a dict of tensors by name", "pass e.g. {'input_ids': ids}"
        require_instance("inputs", inputs, Mapping, expected, way_out)
        require_tensors("inputs", inputs)
    if model.can_generate():
        require_decoder(model, inputs)
    onnxscript = _onnxscript()
    layers, others = int8_layers(model) if dtype == "int8" else (set(), {})
    if layers and has_saturating_int8_products():
        logger.warning(_SATURATION)
    if dtype == "int8" and not layers:
        raise ValueError(
            f"invalid dtype 'int8': no layer of {type(model).__name__} can have int8 products "
            f"({next(iter(others.values()), 'only tables are packed')}); set dtype='fp32'"
        )
    stored = copy_with_stored_state(model, layers)
    inputs, outputs = _inputs_and_outputs(stored, inputs)
    program = _traced(stored, inputs, outputs)
    onnxscript.optimizer.optimize_ir(program.model, should_fold=may_fold)
    strip_metadata(program.model)
    store_as_float16(program.model, leftover_bits == 16)
    with replaced_model(folder) as part:
        path = os.path.join(part, onnx_path(dtype))
        os.makedirs(os.path.dirname(path))
        program.save(path)
        save_companions(model, part, dtype, os.fspath(folder))
    return OnnxExport(folder, dtype, tuple(inputs), outputs, others)


def _inputs_and_outputs(
    model: PreTrainedModel, inputs: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return example inputs, and the names of outputs that are tensors."""
    has_past = model.can_generate()
    batch = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in (inputs or example_inputs(model)).items()
    }
    call = "pass a batch that it takes, inputs={name: tensor}"
    options = {"return_dict": True, **({"use_cache": True} if has_past else {})}
    output = run_batch(model, {**batch, **options}, "inputs", call)
    batch = without_ones(batch)
    names = tuple(name for name, value in output.items() if isinstance(value, Tensor))
    if not has_past:
        return batch, names
    return example_with_past(model, batch["input_ids"], output), (*names, *present_of(output))


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
            dynamic_shapes=(tuple(dynamic_axes(inputs).values()),),
            custom_translation_table={torch.ops.aten.__rshift__.Tensor: _shift_right},
        )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress the messages listed above, and no others."""

    def is_relevant(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_IGNORED_LOG)

    exporter = logging.getLogger(_EXPORTER_LOGGER)
    exporter.addFilter(is_relevant)
    try:
        with warnings.catch_warnings():
            for category, pattern in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", pattern, category)
            yield
    finally:
        exporter.removeFilter(is_relevant)


def _onnxscript() -> Any:
    try:
        import onnx  # noqa: F401  # torch needs it to write
        import onnxscript.optimizer
    except ImportError as error:
        raise ImportError(
            f"export_onnx requires {error.name}; run pip install 'hf-quantnoise[onnx]'"
        ) from error
    return onnxscript


def _shift_right(values: Any, bits: Any) -> Any:
    """Translate uint8 >> uint8, which torch 2.13 does not support."""
    return _onnxscript().opset18.BitShift(values, bits, direction="RIGHT")
