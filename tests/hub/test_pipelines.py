"""``pipeline`` with the folder of a quantized model gives the results of the dequantized one."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.stacked import make_stacked
from support.stored import STORED
from support.tiny import CLASSES, IMAGE_SIZE, SIZES, make_model
from support.words import words
from support.zoo import ZOO, ipq_config
from transformers import (
    BertConfig,
    BertForTokenClassification,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

from hf_quantnoise import quantize_model
from hf_quantnoise.modeling import packed_layers


def pixels():
    """Return an image processor that only needs PIL."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ViTImageProcessorPil(size=size)


def samples():
    return Wav2Vec2FeatureExtractor(sampling_rate=16_000)


def tagger():
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**SIZES, **CLASSES)).eval()


def entailment():
    model = make_model("bert")
    model.config.id2label = {0: "contradiction", 1: "entailment"}
    model.config.label2id = {"contradiction": 0, "entailment": 1}
    return model


def picture(seed):
    values = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(values)


def sound(seed):
    return np.random.default_rng(seed).standard_normal(1600).astype(np.float32)


TEXTS = ["w7 w8 w300 w12", "w41 w3"]
PICTURES = [picture(0), picture(1)]


@dataclass(frozen=True)
class Kind:
    """A task: its model, its processors, two inputs, and the arguments of a call."""

    make: Any
    readers: tuple
    inputs: list
    call: dict = field(default_factory=dict)


KINDS = {
    "text-classification": Kind(lambda: make_model("bert"), (words,), TEXTS, {"top_k": None}),
    "token-classification": Kind(tagger, (words,), TEXTS),
    "fill-mask": Kind(lambda: make_model("bert-mlm"), (words,), ["w7 [MASK] w9", "[MASK] w3"]),
    "feature-extraction": Kind(lambda: make_model("bert"), (words,), TEXTS),  # without its head
    "zero-shot-classification": Kind(entailment, (words,), TEXTS,
                                     {"candidate_labels": ["w20", "w21"]}),
    "text-generation": Kind(lambda: make_model("gpt2"), (words,), TEXTS,
                            {"max_new_tokens": 5, "do_sample": False}),
    "image-classification": Kind(lambda: make_stacked("vit", 2), (pixels,), PICTURES),
    "image-feature-extraction": Kind(lambda: make_stacked("vit", 2), (pixels,), PICTURES),
    "zero-shot-image-classification": Kind(ZOO["CLIP"].make, (words, pixels), PICTURES,
                                           {"candidate_labels": ["w7 w319", "w9 w8 w319"],
                                            "hypothesis_template": "{}"}),
    "automatic-speech-recognition": Kind(ZOO["Wav2Vec2"].make, (words, samples),
                                         [sound(0), sound(1)]),
}  # fmt: skip


def assert_alike(found, expected):
    """Assert that two nested results are equal up to rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    else:
        assert found == expected


@pytest.mark.parametrize("task", KINDS)
def test_pipeline_matches_dequantized_model(task, tmp_path):
    kind = KINDS[task]
    model = kind.make()
    quantize_model(model, ipq_config(model), progress=False).save_pretrained(tmp_path)
    for reader in kind.readers:
        reader().save_pretrained(tmp_path)
    small = pipeline(task, model=str(tmp_path), device="cpu")
    assert any(packed_layers(small.model)) and not small.model.training
    readers = {
        name: getattr(small, name)
        for name in ("tokenizer", "image_processor", "feature_extractor")
        if getattr(small, name, None) is not None
    }
    plain = type(small.model).from_pretrained(tmp_path).dequantize()
    dense = pipeline(task, model=plain, device="cpu", **readers)
    found, expected = ([each(one, **kind.call) for one in kind.inputs] for each in (small, dense))
    assert_alike(found, expected)
    assert str(found[0]) != str(found[1])


def test_pipeline_scores_match_saved_model(tmp_path):
    model = quantize_model(make_model("bert"), STORED["ipq"], progress=False)
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    classify = pipeline(
        "text-classification", model=str(tmp_path), device="cpu", top_k=None,
        function_to_apply="none",
    )  # fmt: skip
    assert type(classify.model) is type(model)
    with torch.no_grad():
        expected = model(**words()(TEXTS[0], return_tensors="pt")).logits[0]
    (answer,) = classify([TEXTS[0]])
    scores = {score["label"]: score["score"] for score in answer}
    for index, label in model.config.id2label.items():
        assert scores[label] == expected[index].item()
