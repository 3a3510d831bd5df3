"""Exports of the zoo, and their outputs in onnxruntime beside those of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_quantnoise import IPQConfig, export_onnx, quantize_model
from hf_quantnoise.export import OnnxExport
from support.zoo import ZOO, ipq_config

# Why some architectures cannot be exported, as words of the error.
REFUSED = "generates token by token and keeps more than the keys and values"
NOT_EXPORTED = dict.fromkeys(("Mamba", "T5", "BART", "Marian", "Whisper"), REFUSED)
# Architectures whose inputs do not follow from the config.
NEED_INPUTS = ("ResNet", "CLIP")
TOLERANCE = 1e-4
SAMPLES = 731  # of a waveform
SIZES = {
    "batch_size": 3, "pixel_values_batch_size": 2, "sequence_length": 7,
    "past_sequence_length": 0, "total_sequence_length": 7,
}  # fmt: skip


def packed(name: str) -> PreTrainedModel:
    """Return a packed model of the zoo, with codes of 4 bits, whose graphs are short."""
    model = ZOO[name].make()
    config = IPQConfig(block_size=4, n_centroids=16, stages=ipq_config(model).stages)
    return quantize_model(model, config, progress=False)


def example_of(name: str) -> dict[str, Tensor] | None:
    """Return the inputs that an architecture is exported with, None for the default."""
    if name not in NEED_INPUTS:
        return None
    batch = ZOO[name].batch().items()
    return {key: v for key, v in batch if isinstance(v, Tensor) and key != "labels"}


def session_of(graph: OnnxExport | bytes, **arguments: Any) -> Any:
    """Return a session that computes exact products of 8-bit integers on every CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    found = graph if isinstance(graph, bytes) else str(graph.file)
    return onnxruntime.InferenceSession(found, options, **arguments)


def inputs_of(session: Any, vocabulary: int) -> dict[str, Tensor]:
    """Return random inputs of the shapes of a graph; the first row of a mask is partly 0."""
    generator, inputs = torch.Generator().manual_seed(0), {}
    for value in session.get_inputs():
        shape = [SIZES.get(size, size) for size in value.shape]
        if value.name == "input_values":
            shape[1] = SAMPLES
        if value.type == "tensor(float)":
            inputs[value.name] = torch.randn(shape, generator=generator)
        elif value.name == "input_ids":
            inputs[value.name] = torch.randint(5, vocabulary, shape, generator=generator)
        else:
            inputs[value.name] = torch.zeros(shape, dtype=torch.int64)
    return inputs


def run(session: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of a session by name."""
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def assert_encoder_agrees(model: PreTrainedModel, session: Any) -> None:
    """Assert that a graph has the outputs of a model, for inputs of other sizes than exported."""
    config = model.config.get_text_config()
    inputs = inputs_of(session, getattr(config, "vocab_size", 0))
    if "attention_mask" in inputs:
        inputs["attention_mask"][:] = 1
        inputs["attention_mask"][0, 5:] = 0
        inputs["input_ids"][0, 5:] = config.pad_token_id
    expected = model(**inputs)
    for name, tensor in run(session, inputs).items():
        assert_close(tensor, expected[name])
        assert tensor.std() > 1e-3  # or the tolerance would accept anything


@torch.no_grad()
def assert_decoder_agrees(model: PreTrainedModel, session: Any) -> None:
    """Assert that a graph continues from its cache, beginning with an empty one.

    The first of three texts is padded on the left.
    """
    prompt = inputs_of(session, model.config.vocab_size)
    ids = prompt["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"position_ids": positions} if "position_ids" in prompt else {}
    expected = model(input_ids=ids, attention_mask=mask, **given).logits
    past = {name: t for name, t in prompt.items() if name.startswith("past_key_values.")}
    assert past and all(np.prod(tensor.shape) == 0 for tensor in past.values())
    logits = []
    for start, end in ((0, 4), (4, 5), (5, 7)):
        step = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **past}
        step |= {name: tensor[:, start:end] for name, tensor in given.items()}
        outputs = run(session, step)
        logits.append(outputs.pop("logits"))
        past = {name.replace("present", "past_key_values"): t for name, t in outputs.items()}
    found = torch.cat(logits, 1)
    assert_close(found[mask.bool()], expected[mask.bool()])
    assert expected.std() > 1e-3


def assert_zoo_export_agrees(name: str, folder: Path) -> OnnxExport:
    """Export an architecture and assert that onnxruntime agrees with torch."""
    model = packed(name)
    result = export_onnx(model, folder, example_of(name))
    check = assert_decoder_agrees if model.can_generate() else assert_encoder_agrees
    check(model, session_of(result))
    return result
