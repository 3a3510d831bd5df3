"""A loaded model in the hands of Transformers: generation, compile, frugal loading."""

import copy

import pytest
import torch
from support.stored import STORED
from support.tiny import make_model

from hf_quantnoise import AutoQuantizedModel, quantize_model
from hf_quantnoise.modeling import packed as packed_module
from hf_quantnoise.quantizers import ProductQuantizer

CONFIG = STORED["ipq"]


def save(name, folder):
    model = quantize_model(make_model(name), CONFIG, progress=False)
    model.save_pretrained(folder)
    return model


def test_generation_is_the_same_after_loading(tmp_path, input_ids):
    model = save("gpt2", tmp_path)
    again = AutoQuantizedModel.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(input_ids, **settings), model.generate(input_ids, **settings))


def test_loading_decodes_nothing(tmp_path, monkeypatch):
    """Neither time nor memory of a dense weight is spent, with a tied head as without."""
    for name in ("bert", "gpt2", "bert-mlm"):
        save(name, tmp_path / name)

    def refuse(*_):
        raise AssertionError("a weight was decoded while loading")

    monkeypatch.setattr(ProductQuantizer, "decode", refuse)
    for name in ("bert", "gpt2", "bert-mlm"):
        AutoQuantizedModel.from_pretrained(tmp_path / name)


def test_a_tied_head_never_stands_whole_in_memory(tmp_path, monkeypatch, input_ids):
    model = save("gpt2", tmp_path)
    with torch.no_grad():
        expected = model(input_ids).logits
    rows = []
    original = packed_module.PackedLayer.decode_rows
    monkeypatch.setattr(packed_module, "SCRATCH_BYTES", 50 * 32 * 4)
    monkeypatch.setattr(
        packed_module.PackedLayer,
        "decode_rows",
        lambda self, which=None: rows.append(len(out := original(self, which))) or out,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, expected)
    assert max(rows) <= 50


def test_copies_are_whole(tmp_path, input_ids):
    model = save("gpt2", tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids).logits, model(input_ids).logits)
        other.get_input_embeddings().weight_codebook.zero_()
        assert not torch.equal(other(input_ids).logits, model(input_ids).logits)
    other.save_pretrained(tmp_path / "copy")
    AutoQuantizedModel.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_it_compiles_without_a_graph_break(name, input_ids):
    model = quantize_model(make_model(name), CONFIG, progress=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids).logits, model(input_ids).logits)
