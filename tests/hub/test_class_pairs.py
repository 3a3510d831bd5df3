"""Every class that loads from a dense folder loads from the packed one of the same model."""

import inspect
import sys

import pytest
import torch
import transformers
from hub.test_conversions import config_of, state_of
from support.conversions import build_tiny
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    PreTrainedModel,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, quantize_model
from hf_quantnoise.hub.skeleton import SHAPES_ARE_CHECKED
from hf_quantnoise.modeling import packed_layers

# Saved class -> number of classes of its file that load from the dense folder.
FAMILIES = {
    "CLIPModel": 6, "SiglipModel": 4, "BlipForConditionalGeneration": 4,
    "T5ForConditionalGeneration": 6, "BertForPreTraining": 9, "BertModel": 9,
    "LlavaForConditionalGeneration": 2, "ViTMAEForPreTraining": 2,
    "BartForConditionalGeneration": 4, "NomicBertForMaskedLM": 4,
}  # fmt: skip


def classes_beside(name):
    """Return the public model classes in the file of a class."""
    members = vars(sys.modules[getattr(transformers, name).__module__])
    public = (member for key, member in members.items() if hasattr(transformers, key))
    models = [cls for cls in public if inspect.isclass(cls) and issubclass(cls, PreTrainedModel)]
    return [cls for cls in models if not cls.__name__.endswith("PreTrainedModel")]


@pytest.mark.parametrize("name", FAMILIES)
def test_classes_load_from_packed_as_from_dense(name, tmp_path):
    model = build_tiny(name)
    quantize_model(model, config_of(model, "mixed"), progress=False)
    model.save_pretrained(tmp_path / "packed")
    dense = type(model).from_pretrained(tmp_path / "packed").dequantize()
    dense.save_pretrained(tmp_path / "dense")
    loaded = 0
    for cls in classes_beside(name):
        try:
            expected, info = cls.from_pretrained(tmp_path / "dense", output_loading_info=True)
        except Exception:  # a class for another kind of config
            continue
        expected = expected.state_dict()
        known = expected.keys() - info["missing_keys"]
        if len(known) < 3:
            continue
        again, info_packed = cls.from_pretrained(tmp_path / "packed", output_loading_info=True)
        assert any(packed_layers(again)), cls
        found = state_of(again)
        assert not [key for key in known if not torch.equal(expected[key], found[key])], cls
        assert info_packed["missing_keys"] <= info["missing_keys"], cls
        loaded += 1
    assert loaded >= FAMILIES[name]


def test_parts_of_clip_give_its_outputs(tmp_path):
    model = build_tiny("CLIPModel")
    quantize_model(model, config_of(model, "mixed"), progress=False)
    model.save_pretrained(tmp_path / "1")
    ids = torch.arange(10).view(2, 5)
    images = torch.randn(2, 3, 32, 32)
    inputs = {CLIPTextModel: {"input_ids": ids}, CLIPVisionModel: {"pixel_values": images}}
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=images)
        for cls, output in zip(
            inputs, (whole.text_model_output, whole.vision_model_output), strict=True
        ):
            part = cls.from_pretrained(tmp_path / "1")
            assert torch.equal(part(**inputs[cls]).last_hidden_state, output.last_hidden_state)
            part.save_pretrained(tmp_path / cls.__name__)
            again = cls.from_pretrained(tmp_path / cls.__name__)
            assert torch.equal(again(**inputs[cls]).last_hidden_state, output.last_hidden_state)
    CLIPModel.from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
    dense = CLIPModel.from_pretrained(tmp_path / "1").dequantize()
    assert "quantization_config" not in str(dense.config.to_dict())


def test_head_of_other_layers_under_one_name_is_left_out(tmp_path):
    """``classifier`` is a layer of one class, and a module with layers in the other one."""
    tagger, classifier = RobertaForTokenClassification, RobertaForSequenceClassification
    model = build_tiny(tagger.__name__)
    quantize_model(model, FixedPointConfig(bits=8), progress=False)
    assert "classifier" in model.config.quantization_config.plan
    model.save_pretrained(tmp_path)
    again, info = classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith("classifier.") for key in info["missing_keys"])
    assert isinstance(again.classifier.out_proj, torch.nn.Linear)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        assert torch.equal(again.roberta(ids)[0], model.roberta(ids)[0])


@pytest.mark.skipif(not SHAPES_ARE_CHECKED, reason="initialised by transformers 5.23 and newer")
def test_auto_class_takes_a_new_head_of_a_packed_one(tmp_path):
    model = build_tiny("RobertaForSequenceClassification")
    quantize_model(model, FixedPointConfig(bits=8), progress=False)
    model.save_pretrained(tmp_path)
    more = {"num_labels": 10, "ignore_mismatched_sizes": True}
    again = AutoQuantizedModel.from_pretrained(tmp_path, **more)
    assert again(torch.arange(10).view(2, 5)).logits.shape == (2, 10)
