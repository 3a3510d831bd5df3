"""ONNX exports of every architecture of the zoo: they agree with torch, or are refused."""

import pytest
from support.onnx_exports import (
    NOT_EXPORTED,
    assert_decoder_agrees,
    assert_zoo_export_agrees,
    packed,
    session_of,
)
from support.tiny import make_model
from support.zoo import ZOO
from transformers import GPT2Config, GPT2LMHeadModel

from hf_quantnoise import IPQConfig, export_onnx, quantize_model

TINY_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 320}


@pytest.fixture(autouse=True)
def _extra():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra 'onnx'")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_EXPORTED])
def test_zoo_export_agrees_with_torch(name, tmp_path):
    assert_zoo_export_agrees(name, tmp_path)


@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_zoo_export_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=NOT_EXPORTED[name]):
        export_onnx(packed(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_decoder_exports_with_a_cache_and_its_tied_table_once(tmp_path):
    import onnx

    model = GPT2LMHeadModel(GPT2Config(**TINY_GPT2)).eval()
    config = IPQConfig(block_size=4, n_centroids=256, stages=["embeddings"])
    model = quantize_model(model, config, progress=False)
    result = export_onnx(model, tmp_path)
    assert result.inputs == (
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
        "past_key_values.0.value",
    )  # fmt: skip
    assert result.outputs == ("logits", "present.0.key", "present.0.value")
    assert (tmp_path / "generation_config.json").is_file()
    session = session_of(result)
    # transformers.js sets the named batch axis, and other named ones to 0.
    past = session.get_inputs()[3]
    assert past.shape == ["batch_size", 2, "past_sequence_length", 16]
    assert_decoder_agrees(model, session)
    tensors = onnx.load(str(result.file)).graph.initializer
    codes = [tensor.name for tensor in tensors if list(tensor.dims) == [320, 8]]
    assert len(codes) == 1


def test_decoder_takes_no_example_inputs(tmp_path):
    model = quantize_model(make_model("gpt2"), IPQConfig(n_centroids=16), progress=False)
    with pytest.raises(ValueError, match=r"invalid inputs.*pass inputs=None"):
        export_onnx(model, tmp_path / "out", {"input_ids": model.dummy_inputs["input_ids"]})
