"""A loaded model in the hands of Transformers: pipelines, generation, compile, frugal loading."""

import copy

import pytest
import torch
from tiny import VOCABULARY, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from hf_quantnoise import AutoQuantizedModel, IPQConfig, quantize_model
from hf_quantnoise.modeling import packed as packed_module
from hf_quantnoise.quantizers import ProductQuantizer

CONFIG = IPQConfig(block_size=4, n_centroids=16)


def save(name, folder):
    model = quantize_model(make_model(name), CONFIG, progress=False)
    model.save_pretrained(folder)
    return model


def word_tokenizer():
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


def test_the_pipeline_gives_the_compressed_model_s_scores(tmp_path):
    model = save("bert", tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    text = "w7 w8 w300 w12"
    classify = pipeline(
        "text-classification", model=str(tmp_path), device="cpu", top_k=None,
        function_to_apply="none",
    )  # fmt: skip
    assert type(classify.model) is type(model)
    inputs = word_tokenizer()(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        expected = model(**inputs).logits[0]
    (answer,) = classify([text])
    scores = {score["label"]: score["score"] for score in answer}
    for index, label in model.config.id2label.items():
        assert scores[label] == expected[index].item()


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
