"""Decoding of loaded models: not while loading, in slices, and independent in copies."""

import copy

import torch
from support.stored import STORED
from support.tiny import make_model

from hf_quantnoise import AutoQuantizedModel, quantize_model
from hf_quantnoise.modeling import packed as packed_module
from hf_quantnoise.modeling.kernels import case
from hf_quantnoise.quantizers import ProductQuantizer

CONFIG = STORED["ipq"]


def save(name, folder):
    model = quantize_model(make_model(name), CONFIG, progress=False)
    model.save_pretrained(folder)
    return model


def test_loading_decodes_no_weight(tmp_path, monkeypatch):
    for name in ("bert", "gpt2", "bert-mlm"):
        save(name, tmp_path / name)

    def fail(*_):
        raise AssertionError("a weight was decoded while loading")

    monkeypatch.setattr(ProductQuantizer, "decode", fail)
    for name in ("bert", "gpt2", "bert-mlm"):
        AutoQuantizedModel.from_pretrained(tmp_path / name)


def test_tied_head_is_decoded_in_slices(tmp_path, monkeypatch, input_ids):
    model = save("gpt2", tmp_path)
    with torch.no_grad():
        expected = model(input_ids).logits
    rows = []
    original = packed_module.PackedLayer.decode_rows
    monkeypatch.setattr(case, "SCRATCH_BYTES", 50 * 32 * 4)
    monkeypatch.setattr(
        packed_module.PackedLayer,
        "decode_rows",
        lambda self, which=None: rows.append(len(out := original(self, which))) or out,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, expected)
    assert max(rows) <= 50


def test_deepcopy_is_independent(tmp_path, input_ids):
    model = save("gpt2", tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids).logits, model(input_ids).logits)
        other.get_input_embeddings().weight_codebook.zero_()
        assert not torch.equal(other(input_ids).logits, model(input_ids).logits)
    other.save_pretrained(tmp_path / "copy")
    AutoQuantizedModel.from_pretrained(tmp_path / "copy")
