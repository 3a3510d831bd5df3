"""Sensitivities of models whose outputs distillation cannot compare."""

import pytest
import torch
from support.tiny import SIZES
from support.trainers import make_trainer
from support.zoo import IMAGES
from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForPreTraining

from hf_quantnoise import CompressionArguments, IPQConfig
from hf_quantnoise.blocks import weight_matrix
from hf_quantnoise.compression import plan_bit_allocation
from hf_quantnoise.compression.bit_allocation.sensitivity import SensitivityMeter
from hf_quantnoise.compression.distillation.logits import HEADS
from hf_quantnoise.compression.distillation.losses import squared_error
from hf_quantnoise.structure import find_layers

CONFIG = IPQConfig(target_bits_per_weight=10, kmeans_iter=2)


def make(name):
    torch.manual_seed(0)
    if name == "detector":
        fields = IMAGES | {"image_size": [32, 32]}
        config = AutoConfig.for_model("yolos", **fields, num_labels=3, num_detection_tokens=4)
        return AutoModelForObjectDetection.from_config(config).eval()
    if name == "two heads":
        return AutoModelForPreTraining.from_config(AutoConfig.for_model("bert", **SIZES)).eval()
    decoder = {f"decoder_{field}": IMAGES[field] for field in IMAGES if "size" not in field}
    sizes = {"decoder_hidden_size": 32, "decoder_intermediate_size": 64}
    config = AutoConfig.for_model("vit_mae", **IMAGES, **decoder, **sizes)
    return AutoModelForPreTraining.from_config(config).eval()


def batch_of(name):
    generator = torch.Generator().manual_seed(1)
    if name == "two heads":
        return {"input_ids": torch.randint(5, 320, (3, 9), generator=generator)}
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}


def layer_called(model, end):
    return next(layer for layer in find_layers(model) if layer.name.endswith(end))


@pytest.mark.parametrize("name", ["detector", "masked images", "two heads"])
def test_outputs_that_cannot_be_distilled_are_compared_by_relative_error(name):
    model, batch = make(name), batch_of(name)
    found = plan_bit_allocation(model, CONFIG, [batch], progress=False)
    assert found.file_bytes <= found.target_bytes
    costs = [weight.cost for weight in found.weights]
    assert all(weight.cost > 0 or weight.stored == "dense" for weight in found.weights)
    assert 0 < max(costs) < 1
    without = plan_bit_allocation(model, CONFIG, progress=False)
    assert costs != [weight.cost for weight in without.weights]


def test_compress_allocates_bits_without_a_teacher_for_masked_images(tmp_path):
    rows = [{"pixel_values": row} for row in batch_of("masked images")["pixel_values"]]

    def stacked(rows):
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}

    parts = {"data_collator": stacked}
    trainer = make_trainer(tmp_path, make("masked images"), rows, parts=parts)
    small = trainer.compress(CONFIG, CompressionArguments(distill=False, stage_epochs=0))
    assert small.config.quantization_config.layer_quantizers


def test_sensitivity_counts_every_logit_and_predicted_box():
    ends = {
        "detector": ("bbox_predictor.layers.2", "class_labels_classifier.layers.2"),
        "two heads": ("seq_relationship", "predictions.transform.dense"),
    }
    for name, layers in ends.items():
        model = make(name)
        meter = SensitivityMeter(model, [batch_of(name)])
        for layer in (layer_called(model, end) for end in layers):
            with torch.no_grad():
                assert meter.measure([layer], 2 * weight_matrix(layer.module)) > 0, layer.name


def test_sensitivity_is_that_of_a_registered_head(monkeypatch):
    monkeypatch.setattr(HEADS, "_registered", dict(HEADS._registered))
    HEADS.register("YolosForObjectDetection")(
        lambda s, t, inputs, T: squared_error(s["pred_boxes"], t["pred_boxes"])
    )
    model = make("detector")
    meter = SensitivityMeter(model, [batch_of("detector")])
    sensitive = layer_called(model, "bbox_predictor.layers.2")
    other = layer_called(model, "class_labels_classifier.layers.2")
    with torch.no_grad():
        assert meter.measure([other], 2 * weight_matrix(other.module)) == 0
        assert meter.measure([sensitive], 2 * weight_matrix(sensitive.module)) > 0


def test_sensitivity_of_random_masks_is_of_the_same_ones():
    model = make("masked images")
    state = torch.get_rng_state()
    meter = SensitivityMeter(model, [batch_of("masked images")] * 2)
    layer = next(layer for layer in find_layers(model) if layer.group == "ffn")
    with torch.no_grad():
        assert meter.measure([layer], weight_matrix(layer.module)) == 0
        assert 0 < meter.measure([layer], 1.01 * weight_matrix(layer.module)) < 0.1
    assert torch.equal(torch.get_rng_state(), state)
