"""Saving a part of a packed model, or a model that contains a packed one."""

import copy

import pytest
import torch
from peft import LoraConfig
from support.files import digest
from support.loaded import output
from support.stacked import inputs_of, make_stacked
from support.stored import PQ, STORED
from support.tiny import make_model
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
)

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, IPQConfig, quantize_model
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.quantizers import FixedPointQuantizer

INPUTS = {"input_ids": inputs_of("bert")["input_ids"]}
REFUSED = r"cannot save this {}.* {}.*is quantized.*dequantize\(\)"


def packed(config=STORED["ipq"], seed=0):
    return quantize_model(make_model("bert", seed), config, progress=False)


def bert_config(**more):
    return BertConfig.from_dict({**make_model("bert").config.to_dict(), **more})


@pytest.fixture
def good_folder(tmp_path):
    """A folder with a model, which a refused save must not change."""
    make_model("bert", 3).save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def assert_refused(model, folder, name):
    before = digest(folder)
    pattern = REFUSED.format(type(model).__name__, name)
    with pytest.raises(ValueError, match=pattern):
        model.save_pretrained(folder)
    assert digest(folder) == before


@pytest.mark.parametrize("kind", STORED)
def test_part_of_packed_model_is_not_saved_alone(kind, good_folder, tmp_path):
    model = packed(STORED[kind])
    model.save_pretrained(tmp_path / "complete")
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "complete")
    for each in (model, loaded, copy.deepcopy(loaded)):
        assert_refused(each.bert, good_folder, "embeddings.word_embeddings")
    # The way out that the error names.
    part = BertModel.from_pretrained(tmp_path / "complete")
    with torch.no_grad():
        expected = model.bert(**INPUTS).last_hidden_state
        assert torch.equal(part(**INPUTS).last_hidden_state, expected)
        part.save_pretrained(tmp_path / "part")
        again = BertModel.from_pretrained(tmp_path / "part")
        assert torch.equal(again(**INPUTS).last_hidden_state, expected)
    model.dequantize().bert.save_pretrained(good_folder)


def test_model_with_packed_encoder_is_not_saved(good_folder, tmp_path):
    encoder = packed().bert
    complete = quantize_model(BertModel(bert_config()), STORED["ipq"], progress=False)
    decoder = BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True))
    for each in (encoder, complete):
        model = EncoderDecoderModel(encoder=each, decoder=decoder)
        assert_refused(model, good_folder, "encoder.embeddings.word_embeddings")
    complete.save_pretrained(tmp_path / "encoder")  # by itself it can be saved
    complete.dequantize()
    model.save_pretrained(good_folder)


def test_new_model_around_a_packed_base_is_not_saved(good_folder):
    model = BertForTokenClassification(bert_config())
    model.bert = packed().bert
    assert_refused(model, good_folder, "bert.embeddings.word_embeddings")


def test_layers_packed_by_hand_are_not_saved(good_folder):
    model = make_model("bert")
    pack_layer(model.classifier, FixedPointQuantizer(bits=8))
    assert_refused(model, good_folder, "classifier")


OTHERS = {
    "other scheme": FixedPointConfig(bits=8, leftover_bits=32),
    "other block size": IPQConfig(block_size=8, n_centroids=16, leftover_bits=32),
    "more layers": IPQConfig(**PQ, stages=["ffn", "attention", "embeddings"], leftover_bits=32),
}


@pytest.mark.parametrize("other", OTHERS)
def test_part_of_another_packed_model_is_not_saved(other, good_folder):
    model = packed(IPQConfig(**PQ, stages=["ffn"], leftover_bits=32))
    model.bert.encoder = packed(OTHERS[other], seed=1).bert.encoder
    before = digest(good_folder)
    with pytest.raises(ValueError, match=r"cannot save .*bert.encoder.layer.0.* plan.*dequantize"):
        model.save_pretrained(good_folder)
    assert digest(good_folder) == before


def test_part_of_a_model_packed_alike_is_saved(tmp_path):
    model = packed()
    model.bert.encoder = packed(seed=1).bert.encoder
    model.save_pretrained(tmp_path)
    again = AutoQuantizedModel.from_pretrained(tmp_path)
    assert torch.equal(output(again, INPUTS), output(model, INPUTS))


def test_adapter_on_a_part_is_saved(tmp_path):
    base = packed().bert
    base.add_adapter(LoraConfig(target_modules=["query"]))
    base.save_pretrained(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        "adapter_model.safetensors"
    ]


def test_dense_model_with_dense_parts_is_saved(tmp_path):
    model = make_stacked("bert", 1)
    model.extra = nn.Linear(2, 2)
    model.save_pretrained(tmp_path)
