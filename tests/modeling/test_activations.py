"""Fixed-point activations of packed layers: calibrated, fixed, saved (sections 3.3 and 7.7)."""

from dataclasses import replace

import pytest
import torch
from support.stored import layers_of_stages
from support.tiny import make_model, make_vision_model
from support.zoo import ZOO
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    TrainingArguments,
)

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseTrainer,
    quantize_model,
    size_report,
)
from hf_quantnoise.modeling import pack_layer, packed_layers
from hf_quantnoise.modeling.activations import InputObserver, calibrate
from hf_quantnoise.quantizers import FixedPointQuantizer
from hf_quantnoise.quantizers.fixed_point import round_activations

CONFIGS = {
    "ipq + int8": IPQConfig(n_centroids=16, codebook_bits=8, activation_bits=8),
    "int8": FixedPointConfig(bits=8, activation_bits=8),
    "int4": FixedPointConfig(bits=4, activation_bits=4, observer="channel"),
}


def batches(count=3):
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(5, 320, (4, 9), generator=generator)} for _ in range(count)]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def test_calibrate_on_tiny_float16_inputs():
    """Their range divided by 255 is below the smallest float16, as a scale it would be 0."""
    layer = nn.Linear(8, 4).half()
    pack_layer(layer, FixedPointQuantizer(bits=8), activation_bits=8)
    inputs = 2.0**-24 * torch.arange(-8, 16).view(3, 8).half()
    calibrate(layer, [layer], [{"input": inputs}])
    assert float(layer.input_scale) > 0
    state = {"scale": layer.input_scale, "zero_point": layer.input_zero_point}
    assert torch.equal(round_activations(inputs, state, 8), inputs)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_round_activations_is_eq_2_and_straight_through():
    values = torch.linspace(-3, 5, 101, requires_grad=True)
    state = {"scale": torch.tensor(0.25), "zero_point": torch.tensor(8.0)}
    rounded = round_activations(values, state, 4)
    expected = ((values.double() / 0.25 + 8).round().clamp(0, 15) - 8) * 0.25
    torch.testing.assert_close(rounded.double(), expected)
    rounded.sum().backward()
    inside = (values >= -2) & (values <= 1.75)
    assert torch.equal(values.grad, inside.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_activations_keeps_dtype(dtype):
    state = {"scale": torch.tensor(0.25), "zero_point": torch.tensor(8.0)}
    assert round_activations(torch.ones(3, dtype=dtype), state, 8).dtype == dtype


def test_observer_clips_outliers():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, generator=generator)
    values[0] = 60.0
    observer = InputObserver()
    for fixed in (False, True):
        observer.bins_are_fixed = fixed
        for part in values.split(5000):
            observer.observe(None, (part,), {})

    def error(state):
        return float((round_activations(values, state, 4) - values).double().square().sum())

    plain = InputObserver()
    plain.observe(None, (values,), {})
    assert error(observer.state(4)) < 0.5 * error(plain.state(4))


@pytest.mark.parametrize(
    "config",
    [
        FixedPointConfig(activation_bits=8),
        FixedPointConfig(activation_bits=8, share_layers=2),
        IPQConfig(
            block_size=4, n_centroids=8, stages=["embeddings", "ffn"], importance="activations"
        ),
    ],
    ids=["inputs", "inputs of shared layers", "importance"],
)
def test_layer_that_never_runs_is_named_before_packing(config):
    """Mamba reads the weights of two layers that it never calls."""
    kind = ZOO["Mamba"]
    model, before = kind.make(), kind.make()
    never_ran = r"layers.0.mixer.(dt_proj|conv1d) never.*exclude_modules=\['back"
    with pytest.raises(ValueError, match=never_ran):
        quantize_model(model, config, progress=False, calibration_data=[kind.batch()] * 2)
    assert [type(module) for module in model.modules()] == [type(m) for m in before.modules()]
    for name, parameter in before.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert not any(module._forward_pre_hooks for module in model.modules())
    config = replace(config, exclude_modules=["dt_proj", "conv1d"])
    quantize_model(model, config, progress=False, calibration_data=[kind.batch()])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_inputs_are_rounded_with_saved_scales(name, config, input_ids, tmp_path):
    model = quantize_model(make_model(name), config, progress=False, calibration_data=batches())
    layers = set(dict(packed_layers(model)).values())
    linear = [layer for layer in layers_of_stages(model) if not isinstance(layer, nn.Embedding)]
    assert linear and all(float(layer.input_scale) > 0 for layer in linear)
    assert all(layer.activation_bits is None for layer in layers - set(linear))
    seen = {}

    def watch(module, args, output):
        seen[module] = (args[0].detach(), output.detach())

    hooks = [layer.register_forward_hook(watch) for layer in linear]
    expected = logits(model, input_ids)
    for hook in hooks:
        hook.remove()
    for layer, (inputs, output) in seen.items():
        state = {"scale": layer.input_scale, "zero_point": layer.input_zero_point}
        rounded = round_activations(inputs, state, config.activation_bits)
        assert rounded.unique().numel() <= 2**config.activation_bits
        weight = layer.weight.t() if "Conv1D" in type(layer).__name__ else layer.weight
        by_hand = nn.functional.linear(rounded, weight, layer.bias)
        torch.testing.assert_close(output, by_hand, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if name == "gpt2" else AutoModelForSequenceClassification
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again, input_ids), expected)
    total = size_report(again).total
    size = (tmp_path / "model.safetensors").stat().st_size
    assert abs(total.disk_bytes - size) <= 0.01 * size
    leftovers = sum(4 * layer.columns for layer in layers if layer.activation_bits is None
                    and not isinstance(layer, nn.Embedding))  # fmt: skip
    wide = quantize_model(make_model(name), IPQConfig(n_centroids=16), progress=False)
    if len(dict(packed_layers(wide))) == len(layers):
        ratio = 32 / config.activation_bits
        assert size_report(wide).total.activation_bytes == (
            ratio * (total.activation_bytes - leftovers) + leftovers
        )
    assert not any("input_scale" in key for key in again.dequantize().state_dict())


def test_new_head_tied_to_packed_table_does_not_round_inputs(input_ids, tmp_path):
    model = quantize_model(
        make_model("bert"), CONFIGS["int8"], progress=False, calibration_data=batches()
    )
    model.save_pretrained(tmp_path / "classifier")
    head, info = AutoModelForMaskedLM.from_pretrained(
        tmp_path / "classifier", output_loading_info=True
    )
    assert not any("decoder.input" in key for key in info["missing_keys"])
    table = head.get_input_embeddings()
    assert head.get_output_embeddings().weight_indices is table.weight_indices
    with torch.no_grad():
        hidden = head.cls.predictions.transform(head.bert(input_ids)[0])
        expected = torch.nn.functional.linear(hidden, table.weight)
    torch.testing.assert_close(logits(head, input_ids), expected)
    head.save_pretrained(tmp_path / "head")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "head")
    assert torch.equal(logits(again, input_ids), logits(head, input_ids))


def test_convolutions_round_inputs():
    model = make_vision_model("resnet")
    data = [{"pixel_values": torch.randn(2, 3, 32, 32)}]
    config = IPQConfig(n_centroids=16, stages=["conv"], activation_bits=8)
    model = quantize_model(model, config, progress=False, calibration_data=data)
    assert all(float(layer.input_scale) > 0 for _, layer in packed_layers(model))


def test_missing_calibration_data_raises(input_ids):
    model = make_model("bert")
    before = logits(model, input_ids)
    with pytest.raises(ValueError, match="activation_bits needs calibration data"):
        quantize_model(model, CONFIGS["int8"], progress=False)
    assert torch.equal(logits(model, input_ids), before)
    with pytest.raises(ValueError, match="activation_bits=9"):
        IPQConfig(activation_bits=9)


@pytest.mark.parametrize("epochs", [0.0, 0.5])
def test_compress_calibrates_each_stage(tmp_path, parity_data, epochs, input_ids):
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, disable_tqdm=True, report_to="none"
    )
    trainer = QuantNoiseTrainer(make_model("bert"), args, train_dataset=parity_data)
    small = trainer.compress(
        IPQConfig(n_centroids=16, codebook_bits=8, activation_bits=8),
        CompressionArguments(stage_epochs=epochs, calibration_batches=2),
    )
    linear = [layer for layer in layers_of_stages(small) if not isinstance(layer, nn.Embedding)]
    assert len(linear) == 12 and all(float(layer.input_scale) > 0 for layer in linear)
    small.eval().save_pretrained(tmp_path / "small")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again, input_ids), logits(small, input_ids))
