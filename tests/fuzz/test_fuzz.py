"""Mutants of every kind of checkpoint end in a right model, or in an error that names the fault.

`make fuzz` runs more of them: FUZZ_EXAMPLES is their number for each test.
"""

import json
import os

import pytest
import torch
from golden.make import CASES
from hypothesis import given, note
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.fuzzing import (
    HOSTILE,
    Original,
    check_report,
    fuzz,
    header_of,
    mutated,
    mutated_bytes,
    original,
    write_header,
)

from hf_quantnoise import AutoQuantizedModel
from hf_quantnoise.modeling import packed_layers

every_kind = pytest.mark.parametrize("kind", CASES)
pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="no /proc to limit the memory"
)


@every_kind
@given(data=st.data())
@fuzz
def test_fuzz_quantization_config(kind, data, tmp_path, capsys):
    source = original(kind)
    folder = source.copy(tmp_path / "mutant")
    stored = data.draw(mutated(source.config["quantization_config"]))
    config = {**source.config, "quantization_config": stored}
    (folder / "config.json").write_text(json.dumps(config))
    source.check(folder)
    check_report(folder, capsys)


@given(data=st.data())
@fuzz
def test_fuzz_config_file(data, tmp_path, capsys):
    """Cut or replaced: other changes may describe another model."""
    source = original("ipq")
    folder = source.copy(tmp_path / "mutant")
    content = (folder / "config.json").read_bytes()
    cut = st.integers(0, len(content) - 3).map(lambda end: content[:end])
    values = st.sampled_from(HOSTILE).map(lambda value: json.dumps(value).encode())
    (folder / "config.json").write_bytes(data.draw(cut | values | st.binary(max_size=20)))
    assert source.load(folder) is None
    check_report(folder, capsys)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint in shards."""
    folder = tmp_path_factory.mktemp("sharded")
    model = AutoQuantizedModel.from_pretrained(original("ipq").folder)
    model.save_pretrained(folder, max_shard_size="2KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return Original("ipq", folder)


@given(data=st.data())
@fuzz
def test_fuzz_index(data, sharded, tmp_path, capsys):
    folder = sharded.copy(tmp_path / "mutant")
    file = folder / "model.safetensors.index.json"
    content = file.read_bytes()
    trees = mutated(json.loads(content)).map(lambda tree: json.dumps(tree).encode())
    file.write_bytes(data.draw(trees | mutated_bytes(content)))
    sharded.check(folder)
    check_report(folder, capsys)


@every_kind
@given(data=st.data())
@fuzz
def test_fuzz_header(kind, data, tmp_path, capsys):
    source = original(kind)
    folder = source.copy(tmp_path / "mutant")
    file = folder / "model.safetensors"
    header, body = header_of(file)
    text = json.dumps(header).encode()
    trees = mutated(header).map(lambda tree: json.dumps(tree).encode())
    text = data.draw(trees | mutated_bytes(text) | st.just(text))
    length = data.draw(st.none() | st.sampled_from([0, 1, len(text) - 1, 2**20, 2**40, 2**64 - 1]))
    body = data.draw(st.just(body) | st.integers(0, len(body)).map(lambda end: body[:end]))
    write_header(file, text, body, length)
    source.check(folder)
    check_report(folder, capsys)


FLOATS = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 6e4, 6e-8]
DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
]  # fmt: skip


class Tensors(dict):
    """Tensors by name, which are not shown when a test fails."""

    def __repr__(self):
        return f"{len(self)} tensors"


@st.composite
def damaged(draw, tensors):
    """Packed tensors, one or two of which have other values, another dtype or another shape."""
    tensors = dict(tensors)
    names = [name for name in tensors if "weight_" in name or "input_" in name]
    for _ in range(draw(st.integers(1, 2))):
        names = [name for name in names if name in tensors and tensors[name].numel()]
        name = draw(st.sampled_from(names))
        tensor = tensors[name].clone()
        change = draw(st.sampled_from(["bytes", "bytes", "fill", "dtype", "shape", "copy", "drop"]))
        note(f"{change} of {name}")
        match change:
            case "bytes":
                flat = tensor.view(-1).view(torch.uint8)
                at = draw(st.integers(0, flat.numel() - 1))
                new = draw(st.binary(min_size=1, max_size=min(16, flat.numel() - at)))
                flat[at : at + len(new)] = torch.frombuffer(bytearray(new), dtype=torch.uint8)
            case "fill" if tensor.is_floating_point():
                tensor = torch.full_like(tensor, draw(st.sampled_from(FLOATS)))
            case "fill":
                tensor = torch.full_like(tensor, draw(st.sampled_from([0, 127, 255])))
            case "dtype":
                tensor = tensor.to(draw(st.sampled_from(DTYPES)))
            case "shape":
                shapes = [(-1,), (1, -1), (-1, 1), (tensor.numel(), 1, 1)]
                tensor = tensor.reshape(draw(st.sampled_from(shapes)))
                tensor = tensor[: draw(st.sampled_from([tensor.shape[0], 0, tensor.shape[0] // 2]))]
            case "copy":
                tensor = tensors[draw(st.sampled_from(names))]
            case "drop":
                del tensors[name]
                continue
        tensors[name] = tensor.contiguous()
    return Tensors({name: tensor.clone() for name, tensor in tensors.items()})


def require_valid(model):
    """Check that the state of packed layers is finite, and each code one that the layer has."""
    for name, layer in packed_layers(model):
        for key, tensor in layer.state.items():
            assert torch.isfinite(tensor).all(), (name, key)
            if key in layer.quantizer.positive:  # the other scales are trained
                assert (tensor > 0).all(), (name, key)
        if hasattr(layer.quantizer, "n_centroids"):
            assert layer.codes().max() < layer.quantizer.n_centroids, name
        for tensor in layer.tensors().values():
            assert tensor.dtype in (torch.uint8, torch.float32), name


@every_kind
@given(data=st.data())
@fuzz
def test_fuzz_tensors(kind, data, tmp_path, capsys):
    source = original(kind)
    folder = source.copy(tmp_path / "mutant")
    file = folder / "model.safetensors"
    save_file(data.draw(damaged(Tensors(load_file(file)))), file, {"format": "pt"})
    if (model := source.load(folder)) is not None:
        require_valid(model)
        source.run(model)
    check_report(folder, capsys)
