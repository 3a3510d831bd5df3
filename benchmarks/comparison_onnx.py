"""ONNX forms of ``comparison.py``: dense, quantized by onnxruntime, and packed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from comparison_checkpoints import Checkpoint
from torch import nn

from hf_quantnoise import export_onnx
from hf_quantnoise.export.onnx_cache import PAST, PRESENT
from hf_quantnoise.export.onnx_file import _inputs_and_outputs, _traced
from hf_quantnoise.export.onnx_graph import strip_metadata

FILE = "model.onnx"


class OnnxModel(nn.Module):
    """A session of onnxruntime that is called like a model, and generates if it has a cache."""

    def __init__(self, folder: str, config) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        (self.path,) = map(str, Path(folder).rglob("*.onnx"))
        self.session = onnxruntime.InferenceSession(self.path, options)
        self.shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.config = config

    def forward(self, input_ids: torch.Tensor, **given: torch.Tensor) -> SimpleNamespace:
        """Return the logits; inputs that are not given have their defaults."""
        return SimpleNamespace(logits=self._run(["logits"], input_ids, given)["logits"])

    def _run(self, outputs: list[str], ids: torch.Tensor, given: dict) -> dict[str, torch.Tensor]:
        values = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        } | given
        for name, shape in self.shapes.items():
            if name not in values:  # keys and values: (batch, heads, past, size)
                values[name] = torch.zeros(len(ids), shape[1], 0, shape[3])
        found = self.session.run(outputs, {name: values[name].numpy() for name in self.shapes})
        return dict(zip(outputs, map(torch.from_numpy, found), strict=True))

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **options: object) -> torch.Tensor:
        """Return the tokens with the most probable next ones, found one by one with a cache."""
        tokens, new, past = ids, ids, {}
        for _ in range(max_new_tokens):
            length = tokens.shape[1]
            given = {
                "attention_mask": torch.ones_like(tokens),
                "position_ids": torch.arange(length - new.shape[1], length)[None],
            }
            found = self._run(self.outputs, new, given | past)
            new = found["logits"][:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], 1)
            past = {
                name.replace(PRESENT, PAST): tensor
                for name, tensor in found.items()
                if name.startswith(PRESENT)
            }
        return tokens


def load_onnx(checkpoint: Checkpoint, folder: str) -> nn.Module:
    """Return a session of the ONNX file in a folder."""
    return OnnxModel(folder, checkpoint.dense.config)


def write_onnx(checkpoint: Checkpoint, folder: str, start: str) -> None:
    """Export the dense model as ``export_onnx`` exports packed ones, and fold its constants."""
    import onnxscript.optimizer

    model = copy.deepcopy(checkpoint.dense)
    program = _traced(model, *_inputs_and_outputs(model, None))
    onnxscript.optimizer.optimize_ir(program.model)
    strip_metadata(program.model)
    program.save(os.path.join(folder, FILE))


def write_onnx_int8(checkpoint: Checkpoint, folder: str, start: str) -> None:
    """Quantize the dense file with onnxruntime: weights and tables, inputs in each run."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(os.path.join(start, FILE))
    del model.graph.value_info[:]  # some are from before the rewrites of torch's exporter
    quantize_dynamic(model, os.path.join(folder, FILE), weight_type=QuantType.QInt8)


def write_packed_onnx(
    checkpoint: Checkpoint, folder: str, start: str, **options: str | int
) -> None:
    """Export the packed model in a folder."""
    export_onnx(checkpoint.auto_class.from_pretrained(start), folder, **options)
