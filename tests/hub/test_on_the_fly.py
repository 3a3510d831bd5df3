"""``from_pretrained("dense", quantization_config=...)``, and dequantization."""

import subprocess
import sys

import pytest
import torch
from support.files import digest
from support.memory import live_bytes
from support.stacked import inputs_of, make_stacked
from support.stored import PQ, stored
from support.tiny import SIZES
from support.zoo import ZOO, ipq_config, tensors_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, IPQConfig, quantize_model

CONFIGS = {
    **stored("ipq", "8 bits", "rows"),
    "int4": FixedPointConfig(bits=4, observer="channel"),
    "shared": IPQConfig(**PQ, share_layers=2),
    "pruned": IPQConfig(**PQ, prune_layers="every_other"),
    "named": IPQConfig(**PQ, layer_quantizers={"lm_head": {"scheme": "int", "bits": 4}}),
}


@torch.no_grad()
def output(model, name="gpt2"):
    return model.eval()(**inputs_of(name)).logits


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folder of a tiny GPT-2 of four layers, its head tied to its table."""
    folder = tmp_path_factory.mktemp("dense")
    make_stacked("gpt2", 4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_the_fly_matches_quantize_model(kind, dense, tmp_path):
    config = CONFIGS[kind]
    before = config.to_dict()
    model, info = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert config.to_dict() == before, "the user's config is unchanged"
    expected = quantize_model(make_stacked("gpt2", 4), config, progress=False)
    assert torch.equal(output(model), output(expected))
    model.save_pretrained(tmp_path / "a")
    expected.save_pretrained(tmp_path / "b")
    again = AutoQuantizedModel.from_pretrained(tmp_path / "a")
    assert torch.equal(output(again), output(model))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# Ties of two and of four, one layer run many times, experts, convolutions, buffers, towers.
SOME_OF_THE_ZOO = ["RoBERTa", "ALBERT", "ModernBERT", "Gemma", "Mixtral", "Mamba", "T5", "BART",
                   "Whisper", "Wav2Vec2", "ViT", "EfficientNet", "CLIP"]  # fmt: skip


@pytest.mark.parametrize("name", SOME_OF_THE_ZOO)
def test_on_the_fly_matches_quantize_model_in_zoo(name, tmp_path):
    kind = ZOO[name]
    expected = kind.make()
    expected.save_pretrained(tmp_path / "dense")
    config = ipq_config(expected)
    model, info = kind.auto.from_pretrained(
        tmp_path / "dense", quantization_config=config, output_loading_info=True
    )
    assert not any(info.values()), info
    quantize_model(expected, config, progress=False)
    model.save_pretrained(tmp_path / "a")
    expected.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    with torch.no_grad():
        found = dict(tensors_of(model(**kind.batch())))
        for key, tensor in tensors_of(expected(**kind.batch())):
            assert torch.equal(found[key], tensor), key


def test_on_the_fly_from_shards(tmp_path):
    make_stacked("gpt2", 4).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CONFIGS["ipq"])
    expected = quantize_model(make_stacked("gpt2", 4), CONFIGS["ipq"], progress=False)
    assert torch.equal(output(model), output(expected))


def test_dtype_is_applied_before_quantization(dense):
    config = CONFIGS["ipq"]
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.bfloat16
    )
    expected = quantize_model(make_stacked("gpt2", 4).bfloat16(), config, progress=False)
    assert model.dtype == torch.bfloat16
    assert torch.equal(output(model), output(expected))


def test_config_dict_and_device_map_auto(dense):
    config = {"quant_method": "hf_quantnoise", "scheme": "ipq", **PQ}
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, device_map="auto"
    )
    expected = quantize_model(make_stacked("gpt2", 4), IPQConfig(**PQ), progress=False)
    assert torch.equal(output(model), output(expected))


def bert(layers):
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers}
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


# Config, arguments, and the share of the dense file that is copied before a layer is packed.
HELD = {
    "int8": (FixedPointConfig(bits=8), {}, 0.0),
    "ipq": (IPQConfig(block_size=8, n_centroids=16), {}, 0.0),
    "bfloat16": (FixedPointConfig(bits=8), {"dtype": torch.bfloat16}, 0.5),
}


@pytest.mark.parametrize("kind", HELD)
def test_on_the_fly_peak_memory(kind, tmp_path, monkeypatch):
    """Besides the dense file (and its copy in another dtype) and the packed model, memory holds the
    scratch of one layer: the same for six layers as for two. Afterwards the file is released."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads are not measured
    config, settings, copied = HELD[kind]
    scratch = {}
    for layers in (2, 6):
        folder = tmp_path / str(layers)
        bert(layers).save_pretrained(folder)
        counted = live_bytes(
            lambda folder=folder: AutoModelForSequenceClassification.from_pretrained(
                folder, quantization_config=config, **settings
            )
        )
        model = counted.result
        own = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        assert counted.left <= own + 4096
        file = (folder / "model.safetensors").stat().st_size
        scratch[layers] = counted.peak - file - (copied * file or own)
    assert scratch[6] <= scratch[2] + 1024
    assert counted.peak < 1.75 * file  # two copies would be twice as much


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (IPQConfig(importance="activations"), "importance.*calibration_data"),
        (FixedPointConfig(activation_bits=8), "activation_bits.*calibration_data"),
        (IPQConfig(target_size_mb=1.0), r"target_size_mb=1\.0.*quantize_model\(model, config\)"),
        (IPQConfig(block_size=5), "block_size=5"),
    ],
)
def test_on_the_fly_without_data_raises(config, words, dense):
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)


def test_quantizing_offloaded_weights_raises(dense):
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h": "disk",
              "transformer.ln_f": "cpu", "lm_head": "cpu"}  # fmt: skip
    with pytest.raises(ValueError, match=r"device_map: transformer.h.0.* is offloaded"):
        AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=CONFIGS["ipq"], device_map=places
        )


def test_auto_quantized_model_refuses_dense_checkpoint(dense):
    with pytest.raises(ValueError, match=r"not quantized.*quantization_config=IPQConfig"):
        AutoQuantizedModel.from_pretrained(dense, quantization_config=CONFIGS["ipq"])


# ---- dequantization ------------------------------------------------------------------------------

STOCK = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    inputs, expected = torch.load(folder + "/expected")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected), folder
assert not any(name.startswith("hf_quantnoise") for name in sys.modules)
"""


def test_dequantized_model_loads_without_package(tmp_path):
    """A loaded, dequantized and saved model has the stock classes and keys, and equal logits in a
    process that never imports the package."""
    folders = []
    for name, config in (
        ("gpt2", CONFIGS["shared"]),
        ("bart", CONFIGS["8 bits"]),
    ):
        folder = tmp_path / name
        quantize_model(make_stacked(name, 2), config, progress=False).save_pretrained(folder)
        model = AutoQuantizedModel.from_pretrained(folder).dequantize()
        stock = make_stacked(name, 2)
        assert type(model) is type(stock) and list(model.state_dict()) == list(stock.state_dict())
        kinds = {key: type(module) for key, module in model.named_modules()}
        assert kinds == {key: type(module) for key, module in stock.named_modules()}
        assert not hasattr(model.config, "quantization_config") and not model.is_quantized
        assert model.all_tied_weights_keys == stock.all_tied_weights_keys
        folders.append(tmp_path / f"{name}-plain")
        model.save_pretrained(folders[-1])
        assert "quantization_config" not in (folders[-1] / "config.json").read_text()
        torch.save((inputs_of(name), output(model, name)), folders[-1] / "expected")
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, folders)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cast", ["while loading", "afterwards", "by dequantize"])
def test_dequantized_model_has_one_dtype(cast, dense):
    first = torch.bfloat16 if cast == "while loading" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=CONFIGS["ipq"], dtype=first
    )
    expected = output(model).float()
    if cast == "afterwards":
        model.to(torch.bfloat16)
    model.dequantize(dtype=torch.bfloat16 if cast == "by dequantize" else None)
    assert len({tensor.dtype for tensor in model.parameters()}) == 1
    torch.testing.assert_close(output(model).float(), expected, rtol=0.05, atol=0.05)


def test_dequantized_model_can_be_quantized_again(dense):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=CONFIGS["ipq"])
    expected = output(model)
    again = quantize_model(model.dequantize(), FixedPointConfig(bits=8), progress=False)
    torch.testing.assert_close(output(again), expected, rtol=0.05, atol=0.05)
