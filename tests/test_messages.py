"""Error messages for about eighty common mistakes: options, calls in the wrong order, files.

``test_messages_objects.py`` has wrong objects in place of models and configs,
``test_messages_data.py`` wrong data, folders and names.
"""

import json

import pytest
from support.mistakes import SMALL, Mistake, check_message, compress, quantize, trainer
from support.stacked import make_stacked
from support.tiny import make_model
from torch import nn

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseCallback,
    QuantNoiseConfig,
    allocate_bits,
    apply_quant_noise,
    export_aqlm,
    export_onnx,
)


def compress_without_data(folder):
    without_data = trainer(folder)
    without_data.train_dataset = None
    without_data.compress(SMALL)


def distill_from_itself(folder):
    student = trainer(folder)
    student.compress(SMALL, teacher=student.model)


def train_from_empty_checkpoint(folder):
    (folder / "checkpoint-1").mkdir()
    trainer(folder).train(resume_from_checkpoint=True)


def load(folder, quantization_config=None, cut=False, **kwargs):
    """Save a packed model, damage it, and load it."""
    quantize(SMALL).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**config["quantization_config"], **(quantization_config or {})}
    config |= kwargs
    (folder / "config.json").write_text(json.dumps(config))
    if cut:
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    AutoQuantizedModel.from_pretrained(folder)


def load_dense(folder):
    make_model("bert").save_pretrained(folder)
    AutoQuantizedModel.from_pretrained(folder)


def load_settings_of_another_class(folder):
    SMALL.save_pretrained(folder)
    FixedPointConfig.from_pretrained(folder)


def load_misspelled_settings(folder):
    settings = {**QuantNoiseConfig().to_dict(), "blok_size": 4}
    (folder / QuantNoiseConfig.file_name).write_text(json.dumps(settings))
    QuantNoiseConfig.from_pretrained(folder)


def quantize_nan():
    model = make_model("bert")
    model.bert.encoder.layer[0].intermediate.dense.weight.data[0, 0] = float("nan")
    quantize(SMALL, model)


def apply_twice():
    model = apply_quant_noise(make_model("bert"), QuantNoiseConfig())
    apply_quant_noise(model, QuantNoiseConfig())


def noise(**options):
    return lambda folder: QuantNoiseConfig(**options)


def apply(**options):
    return lambda folder: apply_quant_noise(make_model("bert"), QuantNoiseConfig(**options))


def ipq(**options):
    return lambda folder: IPQConfig(**options)


def fixed(**options):
    return lambda folder: FixedPointConfig(**options)


def arguments(**options):
    return lambda folder: CompressionArguments(**options)


MISTAKES = {
    # Noise
    "p above 1": Mistake(noise(p=1.5), "p", "1.5"),
    "p not a number": Mistake(noise(p="high"), "p", "'high'"),
    "two rates for one noise": Mistake(noise(p=[0.1, 0.2]), "p", "[0.1, 0.2]"),
    "p_schedule": Mistake(noise(p_schedule="cosine"), "p_schedule", "'cosine'"),
    "unknown noise": Mistake(noise(noise="gaussian"), "noise", "'gaussian'"),
    "misspelled noise": Mistake(noise(noise="prox"), "noise", "'prox'"),
    "no noise": Mistake(noise(noise=[]), "noise", "[]"),
    "noise block_size": Mistake(noise(block_size=0), "block_size", "0"),
    "noise block_size per group": Mistake(noise(block_size={"ffn": "8"}), "block_size", "'8'"),
    "noise n_centroids": Mistake(noise(n_centroids=1), "n_centroids", "1"),
    "block_selection": Mistake(noise(block_selection="rows"), "block_selection", "'rows'"),
    "cluster without blocks": Mistake(
        noise(noise="int8", block_selection="cluster"), "block_selection", "'int8'"
    ),
    "codebook_update": Mistake(noise(codebook_update="step"), "codebook_update", "'step'"),
    "scale_update_steps": Mistake(noise(scale_update_steps=0), "scale_update_steps", "0"),
    "noise observer": Mistake(noise(observer="max"), "observer", "'max'"),
    "layerdrop": Mistake(noise(layerdrop=2), "layerdrop", "2"),
    "activation_bits": Mistake(noise(activation_bits=16), "activation_bits", "16"),
    "share_layers": Mistake(noise(share_layers=0), "share_layers", "0"),
    "target_modules not a regex": Mistake(noise(target_modules="("), "target_modules", "'('"),
    "target_modules without match": Mistake(apply(target_modules="q"), "target_modules", "'q'"),
    "share_layers without layer": Mistake(
        apply(share_layers=[["blocks.1", "blocks.2"]]), "share_layers", "'blocks.1'"
    ),
    "block_size that fits no layer": Mistake(apply(block_size=7), "block_size", "7"),
    "noise twice": Mistake(lambda folder: apply_twice(), "noise"),
    "noise with a target's config": Mistake(
        lambda folder: apply_quant_noise(make_model("bert"), SMALL), "qn_config", "IPQConfig"
    ),
    "callback with a dict": Mistake(
        lambda folder: QuantNoiseCallback({"p": 0.1}), "config", "dict"
    ),
    "misspelled noise option": Mistake(noise(blok_size=4), "blok_size", "block_size"),
    "misspelled option in a file": Mistake(load_misspelled_settings, "blok_size", "block_size"),
    # Targets
    "misspelled target option": Mistake(ipq(n_centroid=16), "n_centroid", "n_centroids"),
    "target block_size": Mistake(ipq(block_size=-4), "block_size", "-4"),
    "target n_centroids": Mistake(ipq(n_centroids=100_000), "n_centroids", "100000"),
    "stages as a string": Mistake(ipq(stages="ffn"), "stages", "'ffn'"),
    "stage twice": Mistake(ipq(stages=["ffn", "ffn"]), "stages", "['ffn', 'ffn']"),
    "stage without block size": Mistake(
        lambda folder: quantize(IPQConfig(block_size={"ffn": 4})), "block_size", "'embeddings'"
    ),
    "codebook_bits": Mistake(ipq(codebook_bits=12), "codebook_bits", "12"),
    "n_codebooks": Mistake(ipq(n_codebooks=3), "n_codebooks", "3"),
    "kmeans_iter": Mistake(ipq(kmeans_iter=0), "kmeans_iter", "0"),
    "importance": Mistake(ipq(importance="hessian"), "importance", "'hessian'"),
    "row_scale": Mistake(ipq(row_scale="yes"), "row_scale", "'yes'"),
    "negative target size": Mistake(ipq(target_size_mb=-1), "target_size_mb", "-1"),
    "two target sizes": Mistake(
        ipq(target_size_mb=1, target_bits_per_weight=2), "target_size_mb", "target_bits_per_weight"
    ),
    "layer_quantizers": Mistake(
        ipq(layer_quantizers={"a": {"scheme": "int", "bits": 12}}), "layer_quantizers", "12"
    ),
    "bits": Mistake(fixed(bits=16), "bits", "16"),
    "target observer": Mistake(fixed(observer="mean"), "observer", "'mean'"),
    # One-shot quantization
    "quantize with a noise config": Mistake(
        lambda folder: quantize(QuantNoiseConfig()), "config", "QuantNoiseConfig"
    ),
    "not a transformers model": Mistake(
        lambda folder: quantize(SMALL, nn.Linear(8, 8)), "model", "Linear"
    ),
    "quantize twice": Mistake(lambda folder: quantize(SMALL, quantize(SMALL)), "model"),
    "no calibration data": Mistake(
        lambda folder: quantize(FixedPointConfig(activation_bits=8)), "activation_bits"
    ),
    "NaN in a weight": Mistake(lambda folder: quantize_nan(), "intermediate.dense", "NaN"),
    "exclude_modules without match": Mistake(
        lambda folder: quantize(IPQConfig(exclude_modules=["lm_head"])),
        "exclude_modules",
        "'lm_head'",
    ),
    "stage without layers": Mistake(
        lambda folder: quantize(IPQConfig(stages=["fnn"])), "stages", "'fnn'"
    ),
    "target size too small": Mistake(
        lambda folder: quantize(IPQConfig(target_size_mb=0.001)), "target_size_mb", "0.001"
    ),
    "target size too large": Mistake(
        lambda folder: quantize(IPQConfig(target_size_mb=500)), "target_size_mb", "500"
    ),
    "allocate_bits without target": Mistake(
        lambda folder: allocate_bits(make_model("bert"), SMALL), "target_size_mb"
    ),
    # Trainer and compression
    "trainer with a dict": Mistake(lambda folder: trainer(folder, {"p": 0.1}), "qn_config", "dict"),
    "compress with a noise config": Mistake(
        lambda folder: compress(folder, QuantNoiseConfig()), "config", "QuantNoiseConfig"
    ),
    "compress without data": Mistake(compress_without_data, "train_dataset"),
    "resume without checkpoints": Mistake(
        lambda folder: compress(folder, resume=True), "save_strategy", "'no'"
    ),
    "resume from empty checkpoint": Mistake(
        train_from_empty_checkpoint, "resume_from_checkpoint", "checkpoint-1"
    ),
    "teacher is the student": Mistake(distill_from_itself, "teacher"),
    "settings of an unknown stage": Mistake(
        lambda folder: compress(folder, stage_settings={"fnn": {"epochs": 2}}),
        "stage_settings",
        "'fnn'",
    ),
    "unknown stage setting": Mistake(
        arguments(stage_settings={"ffn": {"epoch": 2}}), "stage_settings", "'epoch'"
    ),
    "stage_epochs": Mistake(arguments(stage_epochs=-1), "stage_epochs", "-1"),
    "temperature": Mistake(arguments(temperature=0), "temperature", "0"),
    "distill_weight": Mistake(arguments(distill_weight=2), "distill_weight", "2"),
    "distill_layers": Mistake(arguments(distill_layers="first"), "distill_layers", "'first'"),
    "distill_hidden without teacher": Mistake(
        arguments(distill=False, distill_hidden=1.0), "distill_hidden", "1.0"
    ),
    "teacher_device": Mistake(arguments(teacher_device="gpu7"), "teacher_device", "'gpu7'"),
    # Loading and export
    "settings not there": Mistake(
        lambda folder: QuantNoiseConfig.from_pretrained(folder), QuantNoiseConfig.file_name
    ),
    "settings of another class": Mistake(load_settings_of_another_class, "IPQConfig"),
    "auto class instantiated": Mistake(lambda folder: AutoQuantizedModel(), "AutoQuantizedModel"),
    "load a dense model": Mistake(load_dense, "quantization_config"),
    "load another method": Mistake(
        lambda folder: load(folder, {"quant_method": "gptq"}), "quant_method", "'gptq'"
    ),
    "load a newer format": Mistake(
        lambda folder: load(folder, {"format_version": 99}), "format_version", "99"
    ),
    "load an unknown class": Mistake(
        lambda folder: load(folder, architectures=["BertForNothing"]),
        "architectures",
        "BertForNothing",
    ),
    "load a truncated file": Mistake(lambda folder: load(folder, cut=True), "safetensors"),
    "export a dense model to AQLM": Mistake(
        lambda folder: export_aqlm(make_model("bert"), folder), "BertForSequenceClassification"
    ),
    "export intN to AQLM": Mistake(
        lambda folder: export_aqlm(quantize(FixedPointConfig(bits=4)), folder),
        "export_aqlm",
        "int4",
    ),
    "export an encoder-decoder to ONNX": Mistake(
        lambda folder: export_onnx(quantize(SMALL, make_stacked("t5", 1)), folder),
        "T5ForConditionalGeneration",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_message_names_field_value_and_way_out(name, tmp_path):
    check_message(MISTAKES[name], tmp_path)
