"""Statistics of BatchNorm of packed models: in one shot, in stages, resumed, and without data."""

import logging
from copy import deepcopy

import pytest
import torch
from support.norms import IMAGES, assert_stats_of, stats
from support.tiny import make_model, make_vision_model
from support.trainers import Killed, Rows, assert_same_result, make_trainer
from transformers import AutoModelForImageClassification

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    quantize_model,
    update_bn_stats,
)
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.activations import calibrate
from hf_quantnoise.quantizers import FixedPointQuantizer

SMALL = IPQConfig(block_size=4, n_centroids=8, stages=["conv"], leftover_bits=32)


def make_resnet():
    """Return a model whose statistics are those of its weights."""
    return update_bn_stats(make_vision_model("resnet"), [IMAGES])


def test_quantize_model_measures_packed_weights():
    model = make_resnet()
    dense = stats(model)
    packed = quantize_model(model, SMALL, progress=False, calibration_data=[IMAGES])
    assert_stats_of(packed)
    assert any(not torch.allclose(value, dense[key]) for key, value in stats(packed).items())


def test_quantize_model_keeps_most_of_statistics_with_few_examples():
    few = {name: value[:2] for name, value in IMAGES.items()}
    config = FixedPointConfig(bits=8, observer="channel")
    packed = quantize_model(make_resnet(), config, progress=False, calibration_data=[few])
    exact, measured = update_bn_stats(deepcopy(packed), [IMAGES]), stats(packed)
    worse = stats(update_bn_stats(deepcopy(packed), [few]))
    for key, value in stats(exact).items():
        error, reference = (float((each[key] - value).norm()) for each in (measured, worse))
        assert error < 0.1 * reference, key


def test_quantize_model_with_activations_measures_their_inputs_last():
    config = FixedPointConfig(bits=2, activation_bits=8)
    packed = quantize_model(
        make_vision_model("resnet"), config, progress=False, calibration_data=[IMAGES]
    )
    again = deepcopy(packed)
    layers = [layer for _, layer in packed_layers(again)]
    calibrate(again, layers, [IMAGES])
    for (name, one), (_, other) in zip(packed_layers(packed), packed_layers(again), strict=True):
        assert torch.equal(one.input_scale, other.input_scale), name


def test_quantize_model_without_data_warns(caplog):
    with caplog.at_level(logging.WARNING):
        quantize_model(make_vision_model("resnet"), SMALL, progress=False)
    assert "statistics of BatchNorm" in caplog.text and "no calibration_data" in caplog.text
    caplog.clear()
    quantize_model(make_model("bert"), IPQConfig(block_size=4, n_centroids=8), progress=False)
    assert "BatchNorm" not in caplog.text


def test_quantize_model_that_fails_restores_statistics(monkeypatch):
    model = make_vision_model("resnet")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_quantnoise.compression.oneshot.calibrate", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, SMALL, progress=False, calibration_data=[IMAGES])
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("epochs", [0, 2])
def test_compress_measures_packed_weights(tmp_path, epochs):
    noise = QuantNoiseConfig(noise="int4", p=0.5)
    trainer = make_trainer(tmp_path, make_resnet(), Rows(IMAGES), noise)
    args = CompressionArguments(stage_epochs=epochs, plots=False)
    assert_stats_of(trainer.compress(SMALL, args))


@pytest.fixture
def coarse_leftovers(monkeypatch):
    """Store leftovers in 2 bits, which changes statistics much more than 8 bits do."""
    leftover = FixedPointQuantizer(bits=2, observer="channel", trained=False)
    monkeypatch.setattr("hf_quantnoise.modeling.plan.LEFTOVER", leftover)


LAST_PART = IPQConfig(n_centroids=8, stages=[r"resnet\.encoder\.stages\.1\..*"])


def assert_stored_stats_of(model):
    """Assert that statistics are those of the weights, as near as float16 can store them."""
    fresh = stats(update_bn_stats(deepcopy(model), [IMAGES]))
    for key, value in stats(model).items():
        assert torch.equal(value, value.half().float()), key
        torch.testing.assert_close(value, fresh[key], rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("epochs", [0, 2])
def test_compress_measures_leftovers_as_they_are_stored(tmp_path, epochs, coarse_leftovers):
    trainer = make_trainer(tmp_path, make_resnet(), Rows(IMAGES))
    packed = trainer.compress(LAST_PART, CompressionArguments(stage_epochs=epochs, plots=False))
    assert len(list(packed_layers(packed))) > 6
    assert_stored_stats_of(packed)


def test_quantize_model_stores_the_statistics_it_measured(coarse_leftovers):
    model = quantize_model(make_resnet(), LAST_PART, progress=False, calibration_data=[IMAGES])
    assert_stored_stats_of(model)


def test_compress_without_data_warns(tmp_path, caplog):
    trainer = make_trainer(tmp_path, make_vision_model("resnet"), None)
    with caplog.at_level(logging.WARNING):
        trainer.compress(SMALL, CompressionArguments(stage_epochs=0, plots=False))
    assert "statistics of BatchNorm" in caplog.text and "train_dataset" in caplog.text


def test_resumed_compress_is_exact(tmp_path, kill):
    def trainer(name, seed=0):
        return make_trainer(
            tmp_path / name, make_vision_model("resnet", seed=seed), Rows(IMAGES),
            parts={"eval_dataset": Rows(IMAGES)}, per_device_train_batch_size=4,
            save_strategy="steps", save_steps=2,
        )  # fmt: skip

    config = IPQConfig(block_size=4, n_centroids=8, stages=["conv", "head"])
    straight = trainer("a")
    straight.compress(config)
    release = kill(StageTrainer, "training_step", 7)  # of 4 in each stage
    with pytest.raises(Killed):
        trainer("b").compress(config)
    release()
    resumed = trainer("b", seed=7)
    resumed.compress(config, resume_from_checkpoint=True)
    assert_same_result(resumed, straight)


def test_quantizing_while_loading_warns(tmp_path, caplog):
    make_vision_model("resnet").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=SMALL)
    assert "statistics of BatchNorm" in caplog.text and "quantize_model" in caplog.text
