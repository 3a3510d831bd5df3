"""Pruned and shared layers (section 7.9): stored once, and bit-equal after loading."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.stacked import BY_PLACE, STACKED, inputs_of, logits, make_stacked
from support.stored import PQ, tensors_of
from support.tiny import make_vision_model
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
    size_report,
)
from hf_quantnoise.pruning import layers_to_prune, plan_pruning
from hf_quantnoise.sharing import chunks_of

NAMES = [*STACKED, *BY_PLACE]
CONFIGS = {
    "shared": {"share_layers": 2},
    "pruned": {"prune_layers": "every_other"},
    "both": {"share_layers": 2, "prune_layers": "every_other"},
}


def small(name, layers=6, **fields):
    if name == "vit":
        fields = {"stages": ["ffn", "attention"], **fields}
    return quantize_model(make_stacked(name, layers), IPQConfig(**PQ, **fields), progress=False)


@pytest.fixture(params=CONFIGS)
def fields(request):
    return CONFIGS[request.param]


@pytest.mark.parametrize("name", NAMES)
def test_reload_is_bit_equal_and_size_is_reported(name, fields, tmp_path):
    if name == "qwen2" and fields == CONFIGS["pruned"]:
        pytest.skip("its layer types alternate; see test_pruning_keeps_layer_types_of_config")
    model = small(name, **fields)
    model.save_pretrained(tmp_path / "a")
    again, info = AutoQuantizedModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again, name), logits(model, name))
    again.save_pretrained(tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    for each in (model, again):
        assert size_report(each).total.disk_bytes == pytest.approx(size, rel=0.01)
    dense = size_report(make_stacked(name, 6)).total.dense_bytes
    assert size_report(again).total.dense_bytes == dense
    for left, source in again.config.quantization_config.shared_layers.items():
        first = tensors_of(again.get_submodule(source))
        second = tensors_of(again.get_submodule(left))
        assert all(second[key] is first[key] for key in first.keys() & second.keys())


def test_shared_layers_are_stored_once(tmp_path):
    model = small("bert", 4, share_layers=2)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    numbers = {key.split(".")[3] for key in stored if key.startswith("bert.encoder.layer.")}
    assert numbers == {"0", "2"}
    plan = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert plan["shared_layers"] == {
        "bert.encoder.layer.1": "bert.encoder.layer.0",
        "bert.encoder.layer.3": "bert.encoder.layer.2",
    }
    entry = plan["plan"]["bert.encoder.layer.3.output.dense"]
    assert entry["tied_to"] == "bert.encoder.layer.2.output.dense"
    once = size_report(model).total.disk_bytes
    assert once < 0.75 * size_report(small("bert", 4)).total.disk_bytes


def test_shared_model_matches_dense_reference():
    """The reference is a dense model with the decoded weights of each layer."""
    model = small("gpt2", 4, share_layers=2)
    plain = make_stacked("gpt2", 4)
    decoded = {name: m.weight.detach() for name, m in model.named_modules() if hasattr(m, "weight")}
    with torch.no_grad():
        for name, weight in decoded.items():
            plain.get_submodule(name).weight.copy_(weight)
        for number in (1, 3):
            for key, parameter in plain.transformer.h[number].named_parameters():
                if key.endswith("bias"):
                    source = plain.transformer.h[number - 1].get_parameter(key)
                    parameter.copy_(source)
    torch.testing.assert_close(logits(model, "gpt2"), logits(plain, "gpt2"))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_shared_layers_may_be_partly_dense(name, tmp_path):
    """transformers would cut the biases of GPT-2's Conv1D if it tied them."""
    model = small(name, 4, share_layers=2, stages=["ffn"])
    model.save_pretrained(tmp_path / "a")
    again, info = AutoQuantizedModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again, name), logits(model, name))
    again.save_pretrained(tmp_path / "b")
    file = "model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", STACKED)
def test_pruned_model_matches_model_without_layers(name, tmp_path):
    model, shorter = make_stacked(name, 6), make_stacked(name, 6)
    gone = layers_to_prune(model, "every_other", chunks_of(model, 2))
    assert [layer.rpartition(".")[2] for layer in gone[:2]] == ["2", "3"]
    for path in reversed(gone):
        stack, _, number = path.rpartition(".")
        del shorter.get_submodule(stack)[int(number)]
    plan_pruning(model, gone).apply(model)
    assert torch.equal(logits(model, name), logits(shorter, name))
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again, name), logits(model, name))
    assert again.config.num_hidden_layers == model.config.num_hidden_layers == 4


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "bart", "t5", "qwen2"])
def test_pruned_model_generates_with_and_without_cache(name, tmp_path):
    model = small(name, 6, share_layers=2, prune_layers="every_other")
    model.save_pretrained(tmp_path)
    again = AutoQuantizedModel.from_pretrained(tmp_path)
    ids = inputs_of(name)["input_ids"]
    texts = [
        each.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=None)
        for each in (model, again)
        for cache in (True, False)
    ]
    assert all(torch.equal(text, texts[0]) for text in texts[1:])


@pytest.mark.parametrize("name", BY_PLACE)
def test_pruning_keeps_layer_types_of_config(name, tmp_path):
    model = make_stacked(name, 6)
    prefix = "model.layers"
    kinds = list(model.config.layer_types)
    gone = [f"{prefix}.{number}" for number in (1, 3)]
    config = IPQConfig(**PQ, prune_layers=gone)
    quantize_model(model, config, progress=False).save_pretrained(tmp_path)
    again = AutoQuantizedModel.from_pretrained(tmp_path)
    kept = [kinds[number] for number in (0, 2, 4, 5)]
    assert list(again.config.layer_types) == kept
    assert torch.equal(logits(again, name), logits(model, name))


def unchanged(model, attempt, words):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(ValueError, match=words):
        attempt(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert model.config.to_dict() == config
    assert not getattr(model, "is_quantized", False)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (
            "t5",
            {"prune_layers": r".*block\.0"},
            "differs in .*relative_attention_bias.*choose other",
        ),
        ("modernbert", {"prune_layers": ["layers.0"]}, "differs in .*attn_norm"),
        ("bert", {"prune_layers": r".*layer\.9"}, "prune_layers='.*9' matches no layer.*layer.0"),
        ("bert", {"prune_layers": r".*layer\.\d"}, "takes all 4 layers of bert.encoder.layer"),
        ("resnet", {"prune_layers": "every_other"}, "prune_layers='every_other'.*no stack"),
        ("resnet", {"share_layers": 2}, "share_layers=2.*name the layers"),
    ],
)
def test_impossible_pruning_or_sharing_changes_nothing(model, fields, words):
    made = make_vision_model(model) if model == "resnet" else make_stacked(model, 4)
    config = IPQConfig(block_size=1, n_centroids=16, stages=[".*"], **fields)
    unchanged(made, lambda m: quantize_model(m, config, progress=False), words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"share_layers": 0}, "share_layers=0"),
        ({"share_layers": True}, "share_layers=True"),
        ({"share_layers": [["a", "b"], ["b", "c"]]}, "share_layers=.*'b'"),
        ({"share_layers": []}, "share_layers=\\[\\]"),
        ({"prune_layers": 2}, "prune_layers=2"),
        ({"prune_layers": "("}, "prune_layers='\\('"),
    ],
)
def test_invalid_fields_raise(fields, words):
    with pytest.raises(ValueError, match=words):
        IPQConfig(**fields)


def test_base_model_and_other_head_load_shared_layers(tmp_path):
    model = small("roberta-mlm", 4, share_layers=2, prune_layers=["layer.3"])
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert base.config.quantization_config.shared_layers == {"encoder.layer.1": "encoder.layer.0"}
    assert base.encoder.layer[1].output.dense.bias is base.encoder.layer[0].output.dense.bias
    with torch.no_grad():
        hidden = base.eval()(**inputs_of("roberta-mlm")).last_hidden_state
        expected = model.roberta(**inputs_of("roberta-mlm")).last_hidden_state
    assert torch.equal(hidden, expected)
    base.save_pretrained(tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert len(classifier.roberta.encoder.layer) == 3
    weight = classifier.roberta.encoder.layer[1].output.dense.weight_indices
    assert weight is classifier.roberta.encoder.layer[0].output.dense.weight_indices


def test_dequantized_model_saves_and_reloads(tmp_path):
    model = small("llama", 6, share_layers=2, prune_layers="every_other")
    expected = logits(model, "llama")
    plain = model.dequantize()
    torch.testing.assert_close(logits(plain, "llama"), expected)
    plain.save_pretrained(tmp_path)
    again, info = type(plain).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again, "llama"), logits(plain, "llama"))
    assert size_report(again).total.memory_bytes == size_report(plain).total.memory_bytes


def test_compression_keeps_sharing_of_noise_by_default(tmp_path):
    noise = QuantNoiseConfig(p=0.1, block_size=4, share_layers=2)
    for fields, numbers in (({}, {"1", "3"}), ({"share_layers": 1}, set())):
        model = apply_quant_noise(make_stacked("bert", 4), noise)
        quantize_model(model, IPQConfig(**PQ, **fields), progress=False)
        shared = model.config.quantization_config.shared_layers
        assert {layer.rpartition(".")[2] for layer in shared} == numbers


def test_shared_layers_keep_separate_input_scales(tmp_path):
    config = FixedPointConfig(bits=8, activation_bits=8, share_layers=2)
    data = [inputs_of("bert")]
    model = quantize_model(make_stacked("bert", 4), config, False, calibration_data=data)
    layers = model.bert.encoder.layer
    scales = [layer.attention.self.query.input_scale for layer in layers]
    assert not torch.equal(scales[0], scales[1])
    assert (
        layers[0].attention.self.query.weight_scale is layers[1].attention.self.query.weight_scale
    )
    model.save_pretrained(tmp_path)
    again = AutoQuantizedModel.from_pretrained(tmp_path)
    for one, layer in zip(scales, again.bert.encoder.layer, strict=True):
        assert torch.equal(layer.attention.self.query.input_scale, one)
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


def test_share_layers_by_name_in_image_model(tmp_path):
    chunk = [f"mobilenet_v1.layer.{number}" for number in (14, 16, 18)]
    config = IPQConfig(block_size=4, n_centroids=16, stages=["conv"], share_layers=[chunk])
    model = quantize_model(make_vision_model("mobilenet-v1"), config, progress=False)
    model.save_pretrained(tmp_path)
    again = AutoQuantizedModel.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    convolutions = [again.get_submodule(f"{name}.convolution") for name in chunk]
    assert len({id(layer.weight_indices) for layer in convolutions}) == 1


def test_shared_layers_stay_shared_in_training(tmp_path):
    small("bert", 4, share_layers=2).save_pretrained(tmp_path / "a")
    model = AutoQuantizedModel.from_pretrained(tmp_path / "a")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(**inputs_of("bert"), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "b")
    again = AutoQuantizedModel.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))
    before = load_file(tmp_path / "a" / "model.safetensors")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    key = "bert.encoder.layer.0.output.dense.weight_codebook"
    assert not torch.equal(before[key], after[key])


def test_size_report_lists_pruned_layers():
    report = size_report(small("bert", 4, prune_layers="every_other"))
    gone = {row.name: row for row in report.rows if row.stored == "pruned"}
    assert gone.keys() == {"bert.encoder.layer.1", "bert.encoder.layer.3"}
    layer = make_stacked("bert", 1).bert.encoder.layer[0]
    weights = sum(parameter.numel() for parameter in layer.parameters())
    assert {row.dense_bytes for row in gone.values()} == {4 * weights}
    assert "pruned" in str(report)
