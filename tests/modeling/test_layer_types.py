"""Layer types: ``nn.Conv1d``, registered in one file, and types that cannot be packed."""

import copy
import re

import pytest
import torch
from support.tiny import make_model
from support.zoo import ZOO, ipq_config
from torch import nn

from hf_quantnoise import (
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
    size_report,
)
from hf_quantnoise.layer_types import LAYER_TYPES, LayerType, known_layer_type, register_layer_type
from hf_quantnoise.modeling import pack_layer, packed_layers
from hf_quantnoise.modeling.convert import is_packed
from hf_quantnoise.modeling.plan import make_plan
from hf_quantnoise.noise import find_state
from hf_quantnoise.quantizers import FixedPointQuantizer, ProductQuantizer

CONVOLUTIONS = {
    "Whisper": ["model.encoder.conv1", "model.encoder.conv2"],
    "Wav2Vec2": [f"wav2vec2.feature_extractor.conv_layers.{index}.conv" for index in range(2)],
    "Mamba": [f"backbone.layers.{index}.mixer.conv1d" for index in range(2)],
}
LAYERS = {
    "1x1": lambda: nn.Conv1d(8, 16, 1),
    "strided": lambda: nn.Conv1d(8, 16, 3, stride=2, padding=1),
    "grouped": lambda: nn.Conv1d(8, 16, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv1d(32, 32, 4, groups=32, padding=3),
    "circular": lambda: nn.Conv1d(8, 16, 3, dilation=2, padding="same", padding_mode="circular"),
}


# ---- nn.Conv1d in models -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_model_are_packed_and_reported(name, tmp_path):
    kind = ZOO[name]
    model = kind.make()
    dense = copy.deepcopy(model)
    quantize_model(model, ipq_config(model), progress=False)
    stored = model.config.quantization_config
    rows = {row.name: row for row in size_report(model).rows if row.stored != "sentinel"}
    for layer_name in CONVOLUTIONS[name]:
        layer, original = model.get_submodule(layer_name), dense.get_submodule(layer_name)
        assert type(original) is nn.Conv1d and is_packed(layer)
        assert stored.plan[layer_name]["group"] == "conv"
        area = known_layer_type(original).kernel_block(original)
        assert stored.plan[layer_name]["block_size"] == area
        row = rows[f"{layer_name}.weight"]
        assert row.dense_bytes == original.weight.nbytes > row.disk_bytes
        assert row.activation_bytes == 4 * original.in_channels
    unpacked = [key for key in stored.left_dense if "conv" in key]
    assert all("parametrization" in stored.left_dense[key] for key in unpacked)
    assert bool(unpacked) == (name == "Wav2Vec2"), "its positional convolution has weight_norm"

    model.save_pretrained(tmp_path)
    again = kind.auto.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**kind.batch()).loss, model.eval()(**kind.batch()).loss)
    for layer_name in CONVOLUTIONS[name]:
        weight = again.get_submodule(layer_name).weight
        assert torch.equal(weight, model.get_submodule(layer_name).weight)


@pytest.mark.parametrize("name", ["Whisper", "Wav2Vec2"])  # Mamba never calls its convolution
def test_convolutions_of_model_get_noise(name):
    kind = ZOO[name]
    config = QuantNoiseConfig(noise="pq", p=0.5, block_size=4, n_centroids=4,
                              target_modules=CONVOLUTIONS[name])  # fmt: skip
    model = apply_quant_noise(kind.make(), config)
    state = find_state(model)
    assert set(state.layers) == set(CONVOLUTIONS[name])
    model.train()(**kind.batch()).loss.backward()
    assert not state.note_unreached()
    for layer in state.layers.values():
        assert layer.weight.grad.isfinite().all() and layer.weight.grad.norm() > 0


# ---- nn.Conv1d by itself -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_conv1d_packed_forward_matches_dense(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    dense, inputs = copy.deepcopy(layer), torch.randn(3, layer.in_channels, 20)
    pack_layer(layer, ProductQuantizer(known_layer_type(layer).kernel_block(layer), 8))
    dense.weight.data.copy_(layer.weight.detach())
    assert torch.equal(layer(inputs), dense(inputs))
    layer(inputs).square().sum().backward()
    assert layer.weight_codebook.grad.norm() > 0


# ---- types without a packed forward --------------------------------------------------------------


class Scale(nn.Module):
    """A layer of a type that is unknown to the package."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 64))

    def forward(self, inputs):
        return inputs * self.weight


@pytest.fixture
def scale_type(monkeypatch):
    """Register a layer type for `Scale` that has noise but no packed forward."""
    monkeypatch.setattr("hf_quantnoise.layer_types.record.LAYER_TYPES", types := [*LAYER_TYPES])
    layer_type = LayerType(
        layer_class=Scale,
        to_matrix=lambda weight: weight,
        from_matrix=lambda matrix, shape: matrix,
    )
    register_layer_type(layer_type)
    assert types[-1] is layer_type


def test_pack_layer_without_packed_forward_raises_and_keeps_weight(scale_type):
    layer = Scale()
    weight = layer.weight
    for layers in (layer, [nn.Linear(64, 16), layer]):
        with pytest.raises(TypeError, match=r"Scale.*packed_forward"):
            pack_layer(layers, FixedPointQuantizer(bits=8))
    assert layer.weight is weight and type(layer) is Scale


def test_plan_skips_layer_without_packed_forward(scale_type):
    model = nn.ModuleDict({"linear": nn.Linear(64, 16), "scale": Scale()})
    plan, leftovers, skipped = make_plan(model, FixedPointConfig(bits=8))
    assert [weight.layers[0].name for weight in plan[None]] == ["linear"]
    assert not leftovers and "Scale" in skipped["scale"]


def test_layer_type_without_packed_forward_gets_noise(scale_type):
    model = nn.ModuleDict({"linear": nn.Linear(64, 16), "scale": Scale()}).train()
    apply_quant_noise(model, QuantNoiseConfig(noise="proxy", p=1.0, block_size=8))
    assert set(find_state(model).layers) == {"linear", "scale"}
    assert not model.scale(torch.ones(16, 64)).any()
    assert not any(packed_layers(model))


def test_quantize_model_with_layer_without_packed_forward_keeps_its_weight(scale_type):
    model = make_model("bert")
    model.scale = Scale()
    weight = model.scale.weight
    quantize_model(model, FixedPointConfig(bits=8, leftover_bits=32), progress=False)
    assert model.scale.weight is weight and type(model.scale) is Scale
    assert "Scale cannot be packed" in model.config.quantization_config.left_dense["scale"]


# ---- broken types of others ----------------------------------------------------------------------

BROKEN_RECORDS = {
    "layer_class": ({"layer_class": "Scale"}, "layer_class"),
    "packed forward of another class": ({"packed_forward": nn.Linear}, "packed_forward"),
    "packed forward that is a function": ({"packed_forward": lambda x: x}, "packed_forward"),
    "to_matrix that is a number": ({"to_matrix": 3}, "to_matrix"),
    "input_energy that is a number": ({"input_energy": 3}, "input_energy"),
    "unknown group": ({"group": "experts"}, "group"),
}
BROKEN_FUNCTIONS = {
    "to_matrix flattens": ({"to_matrix": torch.flatten}, "to_matrix"),
    "to_matrix drops values": ({"to_matrix": lambda weight: weight[1:]}, "to_matrix"),
    "to_matrix raises": ({"to_matrix": lambda weight: weight.view(7, -1)}, "to_matrix"),
    "to_matrix returns nothing": ({"to_matrix": lambda weight: None}, "to_matrix"),
    "from_matrix transposes": ({"from_matrix": lambda matrix, shape: matrix.t()}, "from_matrix"),
    "from_matrix takes no shape": ({"from_matrix": lambda matrix: matrix}, "from_matrix"),
}
BROKEN_VALUES = {
    "not the inverse": ({"from_matrix": lambda matrix, shape: matrix.flip(0)}, "from_matrix"),
}


def broken_model(settings):
    register_layer_type(LayerType(**{"layer_class": Scale, "packed_forward": Scale, **settings}))
    model = make_model("bert")
    model.scale = Scale()
    return model, model.scale.weight


def assert_names_the_type(error, field):
    assert re.match(rf"invalid {field} of the layer type Scale: got .*, expected .*", str(error))


@pytest.fixture
def no_scale_type(monkeypatch):
    monkeypatch.setattr("hf_quantnoise.layer_types.record.LAYER_TYPES", [*LAYER_TYPES])


@pytest.mark.parametrize("name", BROKEN_RECORDS)
def test_record_of_a_wrong_type_is_refused(name, no_scale_type):
    settings, field = BROKEN_RECORDS[name]
    with pytest.raises(ValueError) as error:
        LayerType(**{"layer_class": Scale, "packed_forward": Scale, **settings})
    assert_names_the_type(error.value, field)


@pytest.mark.parametrize("name", {**BROKEN_FUNCTIONS, **BROKEN_VALUES})
def test_broken_layer_type_is_named_before_a_weight_is_touched(name, no_scale_type):
    settings, field = {**BROKEN_FUNCTIONS, **BROKEN_VALUES}[name]
    model, weight = broken_model(settings)
    with pytest.raises(ValueError) as error:
        quantize_model(model, FixedPointConfig(bits=8), progress=False)
    assert_names_the_type(error.value, field)
    assert model.scale.weight is weight and type(model.scale) is Scale
    assert not any(packed_layers(model))
    if name in BROKEN_FUNCTIONS:  # noise and reports need the matrix, too
        with pytest.raises(ValueError) as error:
            apply_quant_noise(model, QuantNoiseConfig())
        assert_names_the_type(error.value, field)


def test_input_energy_of_a_wrong_shape_is_named(no_scale_type):
    model, weight = broken_model({"input_energy": lambda layer, inputs: inputs.sum()})
    model.__dict__["forward"] = lambda input_ids: (
        type(model).forward(model, input_ids),
        model.scale(torch.ones(16, 64)),
    )
    with pytest.raises(ValueError) as error:
        quantize_model(
            model,
            IPQConfig(n_centroids=8, importance="activations", stages=["head"]),
            progress=False,
            calibration_data=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}],
        )
    assert_names_the_type(error.value, "input_energy")
    assert model.scale.weight is weight and not any(packed_layers(model))


class NarrowLinear(nn.Linear):
    """A subclass with a separate type."""


def test_the_most_specific_layer_type_applies(no_scale_type):
    own = LayerType(layer_class=NarrowLinear, packed_forward=NarrowLinear, group="conv")
    register_layer_type(own)
    assert known_layer_type(NarrowLinear(4, 4)) is own
    assert known_layer_type(nn.Linear(4, 4)) is not own


def test_layer_type_of_others_is_packed_saved_and_trained(no_scale_type):
    model, _ = broken_model({})
    quantize_model(model, FixedPointConfig(bits=8), progress=False)
    layer, inputs = model.scale, torch.randn(16, 64)
    assert is_packed(layer)
    assert torch.equal(layer(inputs), inputs * layer.weight)
    model.dequantize()
    assert type(model.scale) is Scale and model.scale.weight.shape == (16, 64)
