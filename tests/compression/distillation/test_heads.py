"""Heads whose outputs are not classes of examples or tokens."""

import pytest
import torch
from support.tiny import SIZES
from support.zoo import IMAGES
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    BertConfig,
    BertForSequenceClassification,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextConfig,
    BlipVisionConfig,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from hf_quantnoise import CompressionArguments
from hf_quantnoise.compression.distillation.logits import HEADS, logits_divergence
from hf_quantnoise.compression.distillation.losses import (
    sigmoid_divergence,
    softmax_divergence,
    squared_error,
)
from hf_quantnoise.compression.distillation.teacher import Teacher


def detector():
    torch.manual_seed(0)
    config = AutoConfig.for_model("yolos", **IMAGES | {"image_size": [32, 32]}, num_labels=3,
                                  num_detection_tokens=4)  # fmt: skip
    return AutoModelForObjectDetection.from_config(config).eval()


def annotated_images() -> dict[str, Tensor | list]:
    boxes = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": [boxes, boxes]}


def test_logits_divergence_refuses_object_detection():
    model, batch = detector(), annotated_images()
    outputs = {"logits": torch.randn(2, 4, 4), "pred_boxes": torch.rand(2, 4, 4)}
    with pytest.raises(ValueError, match=r"YolosFor.* object detection .*HEADS.*distill=False"):
        logits_divergence(model, outputs, outputs, batch)


def test_logits_divergence_refuses_masked_images():
    config = AutoConfig.for_model("vit_mae", **IMAGES)
    with torch.device("meta"):
        model = AutoModelForPreTraining.from_config(config)
    outputs = {"logits": torch.randn(2, 4, 192)}
    with pytest.raises(ValueError, match=r"ViTMAE.* masked image .*HEADS.*distill=False"):
        logits_divergence(model, outputs, outputs, {"pixel_values": torch.randn(2, 3, 16, 16)})


def test_loss_terms_of_registered_detector(monkeypatch):
    monkeypatch.setattr(HEADS, "_registered", dict(HEADS._registered))
    HEADS.register("YolosForObjectDetection")(
        lambda s, t, inputs, T: squared_error(s["pred_boxes"], t["pred_boxes"])
    )
    model, batch = detector(), annotated_images()
    teacher = Teacher(model, None, CompressionArguments(distill_hidden=1.0))
    outputs = model(batch["pixel_values"], output_hidden_states=True)
    terms = teacher.loss_terms(model, outputs, batch, ["labels"])
    assert {name: value.item() for name, (_, value) in terms.items()} == {"logits": 0, "hidden": 0}


def test_logits_divergence_of_replaced_tokens_is_that_of_independent_labels():
    with torch.device("meta"):
        config = AutoConfig.for_model("electra", **SIZES, embedding_size=16)
        model = AutoModelForPreTraining.from_config(config)
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"attention_mask": mask, "labels": torch.ones(2, 3).long()}
    got = logits_divergence(model, {"logits": student}, {"logits": teacher}, batch, 2.0)
    expected = sigmoid_divergence(student[mask.bool()], teacher[mask.bool()], 2.0)
    torch.testing.assert_close(got, expected)
    without_mask = logits_divergence(model, {"logits": student}, {"logits": teacher}, {}, 2.0)
    torch.testing.assert_close(without_mask, sigmoid_divergence(student, teacher, 2.0))


def blip():
    vision, text = BlipVisionConfig(**IMAGES), BlipTextConfig(**SIZES, encoder_hidden_size=32)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def image_captioner():
    decoder = GPT2Config(n_embd=32, n_layer=1, n_head=2, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**IMAGES), decoder)
    return VisionEncoderDecoderModel(config=config)


@pytest.mark.parametrize(("make", "shift"), [(blip, 1), (image_captioner, 0)])
def test_logits_divergence_of_texts_of_images_reads_labels_like_the_model(make, shift):
    with torch.device("meta"):
        model = make()
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 4, 5, -100], [-100, 3, 6, -100, -100]])
    got = logits_divergence(model, {"logits": student}, {"logits": teacher}, {"labels": labels})
    counted = torch.zeros(2, 5, dtype=torch.bool)
    counted[:, : 5 - shift] = labels[:, shift:] != -100
    torch.testing.assert_close(got, softmax_divergence(student[counted], teacher[counted]))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_logits_divergence_of_one_output_is_the_squared_error_of_regression(shape):
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1))
    batch = {"input_ids": torch.arange(5, 25).view(4, 5), "labels": torch.rand(shape)}
    student, teacher = torch.randn(4, 1), torch.randn(4, 1)
    outputs, expected = ({"logits": student}, {"logits": teacher}), squared_error(student, teacher)
    before = logits_divergence(model, *outputs, batch, 2.0)
    model(**batch)  # the loss sets the type of problem
    assert model.config.problem_type == "regression"
    assert before == logits_divergence(model, *outputs, batch, 2.0) == expected


@pytest.mark.parametrize("n_labels", [1, 3])
def test_logits_divergence_of_independent_labels_follows_the_loss_of_the_labels(n_labels):
    problem = "multi_label_classification" if n_labels == 1 else None
    config = BertConfig(**SIZES, num_labels=n_labels, problem_type=problem)
    model = BertForSequenceClassification(config)
    labels = torch.ones(4, n_labels)
    batch = {"input_ids": torch.arange(5, 25).view(4, 5), "labels": labels}
    student, teacher = torch.randn(4, n_labels), torch.randn(4, n_labels)
    got = logits_divergence(model, {"logits": student}, {"logits": teacher}, batch)
    model(**batch)
    assert model.config.problem_type == "multi_label_classification"
    assert got == sigmoid_divergence(student, teacher)
