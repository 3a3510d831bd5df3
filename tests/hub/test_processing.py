"""Tokenizers, processors and generation configs travel with packed models."""

import copy
import filecmp
import json
import pickle
import shutil
import socket

import pytest
import torch
from support.files import digest
from support.stored import STORED
from support.tiny import SIZES, make_model
from support.trainers import training_arguments
from support.words import words
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    GenerationConfig,
    ViTImageProcessor,
    Wav2Vec2FeatureExtractor,
)

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseTrainer,
    quantize_model,
)
from hf_quantnoise.cli import main
from hf_quantnoise.cli.uploading import check_packed
from hf_quantnoise.hub import processing
from hf_quantnoise.hub.processing import PROCESSING_ATTRIBUTE, processing_files
from hf_quantnoise.publishing import push

# What a trainer gets as processing_class -> the files that it writes.
KINDS = {
    "tokenizer": (words, ["tokenizer.json", "tokenizer_config.json"]),
    "image processor": (ViTImageProcessor, ["preprocessor_config.json"]),
    "feature extractor": (Wav2Vec2FeatureExtractor, ["preprocessor_config.json"]),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Saving must not even try to reach the Hub."""

    def connect(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def warnings(monkeypatch):
    """Return the list of warnings that the module logs."""
    found = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(processing.logger, name, found.append, raising=False)
    return found


def quantized(name="bert", seed=0):
    return quantize_model(make_model(name, seed), STORED["int8"], progress=False)


def compressed(folder, processing_class=None, **parts):
    """Return a trainer after a compression run without training, and the packed model."""
    args = training_arguments(folder / "run")
    trainer = QuantNoiseTrainer(
        make_model("bert"), args, processing_class=processing_class, **parts
    )
    config = IPQConfig(block_size=4, n_centroids=16)
    return trainer, trainer.compress(config, CompressionArguments(stage_epochs=0, plots=False))


@pytest.mark.parametrize("kind", KINDS)
def test_processing_class_of_the_trainer_is_saved(kind, tmp_path, warnings):
    make, files = KINDS[kind]
    trainer, small = compressed(tmp_path, make())
    small.save_pretrained(tmp_path / "a")
    trainer.save_model(str(tmp_path / "b"))
    small.save_pretrained(tmp_path / "b")  # over it
    make().save_pretrained(tmp_path / "expected")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert processing_files(str(folder)) == files
        _, different, missing = filecmp.cmpfiles(tmp_path / "expected", folder, files, False)
        assert not different and not missing
    # It travels on with the loaded model.
    again = AutoQuantizedModel.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "c")
    assert digest(tmp_path / "c") == digest(tmp_path / "a")
    assert not warnings


def test_tokenizer_of_the_data_collator_is_saved(tmp_path):
    class Collator:
        tokenizer = words()

        def __call__(self, rows):
            raise AssertionError

    _, small = compressed(tmp_path, data_collator=Collator())
    small.save_pretrained(tmp_path / "a")
    assert processing_files(str(tmp_path / "a")) == KINDS["tokenizer"][1]


def test_tokenizer_of_the_folder_is_saved_after_quantize_model(tmp_path, warnings):
    make_model("bert").save_pretrained(tmp_path / "dense")
    words().save_pretrained(tmp_path / "dense")
    model = type(make_model("bert")).from_pretrained(tmp_path / "dense")
    quantize_model(model, STORED["int8"], progress=False).save_pretrained(tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert tokenizer("w7 w300").input_ids == [7, 300]
    assert not warnings


@pytest.mark.parametrize("quantization", [None, FixedPointConfig(bits=8)])
def test_tokenizer_of_the_subfolder_is_saved(quantization, tmp_path, warnings):
    """Not that of the folder, which may be of another model."""
    other = words()
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path / "models")
    model = make_model("bert") if quantization else quantized()
    model.save_pretrained(tmp_path / "models" / "small")
    shared = {"subfolder": "small", "quantization_config": quantization}
    load = type(model).from_pretrained
    load(tmp_path / "models", **shared).save_pretrained(tmp_path / "a")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == len(other)
    words().save_pretrained(tmp_path / "models" / "small")
    load(tmp_path / "models", **shared).save_pretrained(tmp_path / "b")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "b")) == len(words())


def test_unknown_tokenizer_is_warned_about(tmp_path, warnings):
    quantized().save_pretrained(tmp_path / "small")
    assert len(warnings) == 1 and "tokenizer.save_pretrained(folder)" in warnings[0]
    _, small = compressed(tmp_path)
    small.save_pretrained(tmp_path / "compressed")
    assert len(warnings) == 2 and "processing_class=tokenizer" in warnings[1]


def test_missing_image_processor_is_warned_about_before_a_push(tmp_path, warnings):
    """Not when the model is saved: models of pixels may need none, and loading one raises."""
    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    model = quantize_model(ConvNextForImageClassification(config), STORED["int8"], progress=False)
    model.save_pretrained(tmp_path)
    assert not warnings
    with pytest.raises((OSError, ImportError)):  # torchvision or Pillow may be missing
        AutoImageProcessor.from_pretrained(tmp_path)
    check_packed(str(tmp_path))
    assert len(warnings) == 1
    assert "no image processor or" in warnings[0] and "tokenizer" not in warnings[0]


def test_tokenizer_saved_before_the_model_is_kept(tmp_path, warnings):
    """A folder's own tokenizer is not replaced by that of the base model."""
    make_model("bert").save_pretrained(tmp_path / "dense")
    words().save_pretrained(tmp_path / "dense")
    model = type(make_model("bert")).from_pretrained(tmp_path / "dense")
    model = quantize_model(model, STORED["int8"], progress=False)
    tokenizer = words()
    tokenizer.save_pretrained(tmp_path / "same")
    model.save_pretrained(tmp_path / "same")
    assert not warnings
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "own")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "own")) == len(tokenizer)
    assert len(warnings) == 1 and "differs from the one in" in warnings[0]


def test_push_uploads_the_tokenizer_that_is_passed(monkeypatch, tmp_path):
    """Not the one that the model was compressed with."""
    model = quantized()
    setattr(model, PROCESSING_ATTRIBUTE, words())
    other = words()
    other.add_tokens(["new"])
    monkeypatch.setattr(push, "create_repository", lambda repo_id, **_: repo_id)
    monkeypatch.setattr(push, "existing_card", lambda *_: None)
    monkeypatch.setattr(push, "rejected_metadata", lambda *_: None)
    uploaded = tmp_path / "uploaded"
    monkeypatch.setattr(
        push, "upload_model", lambda _, folder, **__: shutil.copytree(folder, uploaded)
    )
    push.push_to_hub(model, "me/small", processing_class=other)
    assert len(AutoTokenizer.from_pretrained(uploaded)) == len(other)


@pytest.mark.parametrize("wrong", ["out/dense", type(words())], ids=["path", "class"])
def test_push_refuses_what_is_no_tokenizer(wrong):
    with pytest.raises(
        TypeError, match=r"invalid processing_class: got .*; pass e\.g\. AutoTokenizer"
    ):
        push.push_to_hub(make_model("bert"), "me/small", processing_class=wrong)


@pytest.mark.parametrize("command", ["compress", "convert"])
def test_commands_copy_tokenizer_and_generation_config(command, tmp_path, warnings):
    model = make_model("gpt2")
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=5, do_sample=True)
    given = tmp_path / "given"
    if command == "convert":
        quantize_model(model, STORED["int8"], progress=False)
    model.save_pretrained(given)
    words().save_pretrained(given)
    warnings.clear()
    flags = ["--scheme", "fixed_point"] if command == "compress" else ["--to", "dense"]
    assert main([command, str(given), str(tmp_path / "made"), *flags]) == 0
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    for name in ("max_new_tokens", "eos_token_id", "do_sample"):
        assert getattr(made.generation_config, name) == getattr(model.generation_config, name)
    assert processing_files(str(tmp_path / "made")) == KINDS["tokenizer"][1]
    assert not warnings
    for name in KINDS["tokenizer"][1]:
        (given / name).unlink()
    assert main([command, str(given), str(tmp_path / "made"), *flags, "--overwrite"]) == 0
    assert not processing_files(str(tmp_path / "made")) and warnings


def test_generation_config_survives_two_saves(tmp_path):
    model = make_model("gpt2")
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=5)
    quantize_model(model, STORED["int8"], progress=False).save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    values = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert values["max_new_tokens"] == 3


def test_push_of_a_folder_without_tokenizer_is_warned_about(tmp_path, warnings):
    model = quantized()
    model.save_pretrained(tmp_path)
    warnings.clear()
    check_packed(str(tmp_path))
    assert len(warnings) == 1
    words().save_pretrained(tmp_path)
    check_packed(str(tmp_path))
    assert len(warnings) == 1


def test_copies_and_dequantized_models_save_themselves(tmp_path):
    model = quantized()
    setattr(model, PROCESSING_ATTRIBUTE, words())
    model.save_pretrained(tmp_path / "a")
    for number, again in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        folder = tmp_path / str(number)
        with torch.no_grad():
            model.classifier.bias += 1  # the copy saves its own weights
        again.save_pretrained(folder)
        assert digest(folder) == digest(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    model.dequantize().save_pretrained(tmp_path / "a")
    assert type(model).from_pretrained(tmp_path / "a").config.hidden_size == SIZES["hidden_size"]
    assert model.save_pretrained.__func__ is type(model).save_pretrained
