"""layer_quantizers: allocated, printed, saved, edited, reused, compressed in stages, refused."""

import copy
import json

import pytest
import torch
from support.processes import needs_gloo, on_two_ranks
from support.stacked import inputs_of, make_stacked
from support.tiny import make_model
from support.trainers import make_trainer

import hf_quantnoise
from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    allocate_bits,
    apply_quant_noise,
    quantize_model,
    size_report,
)
from hf_quantnoise.compression import check_plan, plan_bit_allocation
from hf_quantnoise.compression.bit_allocation import allocate
from hf_quantnoise.configuration import QuantizedModelConfig
from hf_quantnoise.modeling import packed_layers

SMALL = {"codebook_bits": 16, "kmeans_iter": 3}


# ---- print, save, edit, reuse ----------------------------------------------------------------


@pytest.fixture(scope="module")
def allocated():
    return allocate_bits(
        make_stacked("bert", 2), IPQConfig(target_size_mb=0.04, **SMALL), progress=False
    )


def test_allot_is_a_deprecated_alias(allocated):
    config = IPQConfig(target_size_mb=0.04, **SMALL)
    with pytest.warns(FutureWarning, match=r"0\.2\.0.*allocate_bits"):
        old = hf_quantnoise.allot(make_stacked("bert", 2), config, progress=False)
    assert old == allocated
    assert hf_quantnoise.allot.__name__ not in hf_quantnoise.__all__


def test_allocate_bits_prints_every_weight_and_the_size(capsys):
    model = make_stacked("gpt2", 2)
    config = allocate_bits(model, IPQConfig(target_size_mb=0.035, **SMALL))
    printed = capsys.readouterr().out
    for name in config.layer_quantizers:
        assert name in printed
    assert "transformer.wte (+1)" in printed  # the head holds it too
    assert "MB of 0.035 MB" in printed and "cost" in printed


def test_allocation_round_trips_through_json_to_identical_files(allocated, tmp_path):
    values = json.loads(allocated.to_json_string())
    again = QuantizedModelConfig.from_dict(values)
    assert again.layer_quantizers == allocated.layer_quantizers
    for folder, config in (("a", allocated), ("b", again)):
        quantize_model(make_stacked("bert", 2), config, progress=False).save_pretrained(
            tmp_path / folder
        )
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    stored = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert stored["layer_quantizers"] == allocated.layer_quantizers
    assert stored["target_size_mb"] == 0.04
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "a")
    assert loaded.config.quantization_config.layer_quantizers == allocated.layer_quantizers
    # The config of a loaded model can quantize another model.
    other = quantize_model(
        make_stacked("bert", 2), loaded.config.quantization_config, progress=False
    )
    assert other.config.quantization_config.plan == loaded.config.quantization_config.plan


def test_edited_allocation_is_used_without_measuring(allocated, monkeypatch):
    monkeypatch.setattr("hf_quantnoise.compression.bit_allocation.allocate.candidates_for", None)
    edited = copy.deepcopy(allocated)
    query = "bert.encoder.layer.0.attention.self.query"
    key = "bert.encoder.layer.1.attention.self.key"
    edited.layer_quantizers[query] = {"scheme": "int", "bits": 2}
    edited.layer_quantizers[key] = {"scheme": "pq", "block_size": 8, "n_centroids": 16}
    small = quantize_model(make_stacked("bert", 2), edited, progress=False)
    assert small.get_submodule(query).quantizer.short_name == "int2"
    assert small.get_submodule(key).quantizer.short_name == "pq 16x8 f16"


def test_edited_allocation_over_the_target_is_refused(allocated):
    edited = copy.deepcopy(allocated)
    for name in list(edited.layer_quantizers)[:8]:
        edited.layer_quantizers[name] = {"scheme": "dense"}
    model = make_stacked("bert", 2)
    with pytest.raises(ValueError, match=r"target_size_mb=0\.04.*40,000 bytes.*layer_quantizers"):
        quantize_model(model, edited, progress=False)
    assert not list(packed_layers(model))


def test_plan_of_another_model_is_accepted_as_layer_quantizers():
    first = quantize_model(make_stacked("gpt2", 2), IPQConfig(n_centroids=16), progress=False)
    plan = first.config.quantization_config.plan
    again = quantize_model(
        make_stacked("gpt2", 2), IPQConfig(layer_quantizers=plan, block_size=8), progress=False
    )
    assert again.config.quantization_config.plan == plan


def test_pruned_and_shared_layers_have_their_final_names(tmp_path):
    fields = {"share_layers": 2, "prune_layers": "every_other"}
    config = IPQConfig(target_size_mb=0.027, **fields, **SMALL)
    config = allocate_bits(make_stacked("bert", 8), config, progress=False)
    indices = {n.split(".")[3] for n in config.layer_quantizers if ".layer." in n}
    assert indices == {"0", "2"}  # four of eight layers remain, in two chunks
    small = quantize_model(make_stacked("bert", 8), config, progress=False)
    small.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 27_000
    again = AutoQuantizedModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = [m(**inputs_of("bert")).logits for m in (small.eval(), again)]
    assert torch.equal(*logits)


# ---- compression runs ------------------------------------------------------------------------


def test_compress_measures_sensitivity_on_training_data(tmp_path, parity_data, capsys, monkeypatch):
    seen = []
    original = allocate.costs_by_output
    monkeypatch.setattr(
        allocate, "costs_by_output", lambda *args: seen.append(args[2]) or original(*args)
    )
    trainer = make_trainer(
        tmp_path / "run", make_model("bert"), parity_data, QuantNoiseConfig(p=0.1)
    )
    args = CompressionArguments(stage_epochs=0.2, budget_batches=2)
    small = trainer.compress(IPQConfig(target_size_mb=0.045, **SMALL), args)
    assert len(seen) == 1 and len(seen[0]) == 2
    assert seen[0][0]["input_ids"].shape == (16, 8)
    assert "MB of 0.045 MB" in capsys.readouterr().out
    assert next(record["stage"] for record in trainer.compression_history) == "dense"
    small.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 45_000
    assert small.config.quantization_config.layer_quantizers


def test_compress_skips_a_stage_without_quantized_layers(tmp_path, parity_data):
    layers = {
        name: {"scheme": "dense"}
        for name, layer in make_stacked("bert", 2).named_modules()
        if "attention" in name and hasattr(layer, "weight") and "LayerNorm" not in name
    }
    trainer = make_trainer(tmp_path, make_model("bert"), parity_data)
    small = trainer.compress(
        IPQConfig(n_centroids=16, layer_quantizers=layers), CompressionArguments(stage_epochs=0)
    )
    stages = [record["stage"] for record in trainer.compression_history]
    assert stages == ["dense", "ffn", "embeddings"]
    reasons = small.config.quantization_config.left_dense
    assert all("layer_quantizers" in reasons[name] for name in layers)


PIECE = """
import contextlib, io
from support.stacked import make_stacked

from hf_quantnoise import IPQConfig, allocate_bits

torch.manual_seed(rank)  # each rank has its own batches
batch = {"input_ids": torch.randint(5, 320, (2, 9))}
config = IPQConfig(target_size_mb=0.03, codebook_bits=16)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    config = allocate_bits(make_stacked("gpt2", 2), config, [batch])
found |= {"layers": config.layer_quantizers, "printed": printed.getvalue(), "batch": batch}

model = make_stacked("gpt2", 2)
config = IPQConfig(target_size_mb=0.03, codebook_bits=16)
batches = [] if rank else [{"labels": torch.zeros(2)}]
found["error"] = error_of(allocate_bits, model, config, batches, False)
found["type_error"] = error_of(allocate_bits, model, config, [] if rank else ["text"], False)
"""


@pytest.mark.slow
@needs_gloo
def test_allocation_uses_the_batches_of_all_ranks(tmp_path):
    first, second = on_two_ranks(PIECE, tmp_path)
    assert first["layers"] == second["layers"] and len(first["layers"]) > 5
    config = IPQConfig(target_size_mb=0.03, codebook_bits=16)
    batches = [first["batch"], second["batch"]]
    alone = allocate_bits(make_stacked("gpt2", 2), config, batches, False)
    assert alone.layer_quantizers == first["layers"]
    assert "total file size" in first["printed"] and not second["printed"]
    # If a forward fails on one rank, all ranks raise.
    assert first["error"].startswith("ValueError: invalid batches: ")
    assert second["error"] == first["error"]
    assert first["type_error"].startswith("TypeError: invalid batches[0]: got str 'text'")
    assert second["type_error"] == first["type_error"]


# ---- errors ----------------------------------------------------------------------------------


def test_unreachable_target_names_the_smallest_size():
    model = make_stacked("bert", 2)
    before = copy.deepcopy(model.state_dict())
    config = IPQConfig(target_size_mb=0.005, prune_layers="every_other")
    with pytest.raises(ValueError, match=r"target_size_mb=0\.005"):
        check_plan(model, config)
    with pytest.raises(ValueError) as error:
        quantize_model(model, config, progress=False)
    for words in (
        "target_size_mb=0.005", "5,000 bytes", "bits per weight", "head to stages",
        "codebook_bits", "prune_layers",
    ):  # fmt: skip
        assert words in str(error.value)
    assert model.config.num_hidden_layers == 2
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    size = int(str(error.value).split("takes ")[1].split(" ")[0].replace(",", ""))
    reachable = IPQConfig(target_size_mb=size / 1e6, prune_layers="every_other", kmeans_iter=1)
    small = quantize_model(model, reachable, progress=False)
    assert size_report(small).total.disk_bytes <= size


NAME = "bert.encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_size_mb": 5}, ["target_size_mb=5", "without quantization"]),
        ({"layer_quantizers": {"bert.encoder.layer.0.output.dens": {"scheme": "dense"}}},
         ["'bert.encoder.layer.0.output.dens'", f"Did you mean '{NAME}'"]),
        ({"layer_quantizers": {NAME: {"scheme": "pqq"}}}, [NAME, "'pqq'"]),
        ({"layer_quantizers": {NAME: {"scheme": "int", "bit": 4}}}, [NAME, "bit"]),
        ({"layer_quantizers": {NAME: {"scheme": "pq", "block_size": 7}}},
         [NAME, "block size 7"]),
        ({"layer_quantizers": {"classifier": {"scheme": "int", "bits": 4}}},
         ["'classifier'", "stages="]),
        ({"layer_quantizers": {NAME: {"scheme": "dense"}}, "exclude_modules": [NAME]},
         [NAME, "exclude_modules"]),
        ({"layer_quantizers": {"bert.encoder.layer.0.output.dense": {"scheme": "int", "bits": 2},
                               "bert.encoder.layer.1.output.dense": {"scheme": "int", "bits": 3}},
          "share_layers": 2}, ["layer.0.output.dense", "layer.1.output.dense"]),
    ],
)  # fmt: skip
def test_invalid_layer_quantizers_are_refused_without_changing_the_model(fields, words):
    model = make_stacked("bert", 2)
    with pytest.raises(ValueError) as error:
        quantize_model(model, IPQConfig(n_centroids=16, **fields), progress=False)
    for word in words:
        assert word in str(error.value)
    assert not list(packed_layers(model))


def test_plan_bit_allocation_errors(tmp_path):
    model = make_stacked("bert", 2)
    with pytest.raises(ValueError, match="target_size_mb or target_bits"):
        plan_bit_allocation(model, IPQConfig())
    with pytest.raises(TypeError, match="FixedPointConfig"):
        plan_bit_allocation(model, FixedPointConfig())
    config = IPQConfig(target_size_mb=0.04)
    with pytest.raises(ValueError, match="remove_quant_noise"):
        plan_bit_allocation(apply_quant_noise(make_stacked("bert", 2), QuantNoiseConfig()), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="n_codebooks=2"):
        IPQConfig(target_size_mb=0.04, n_codebooks=2)
    with pytest.raises(ValueError, match=r"target_size_mb=0\.04.*from_pretrained"):
        type(model).from_pretrained(tmp_path, quantization_config=config)
    insensitive = copy.deepcopy(model)
    with torch.no_grad():
        insensitive.classifier.weight.zero_()
    with pytest.raises(ValueError, match=r"sensitivities.*calibration batches"):
        plan_bit_allocation(insensitive, config, [inputs_of("bert")], progress=False)
