"""Squeeze-and-excitation blocks get no noise by default (section 7.8), in any model's naming."""

import pytest
import torch
from support.tiny import IMAGE_SIZE, make_vision_model
from torch import nn
from transformers import RegNetConfig, RegNetForImageClassification
from transformers.models.pp_lcnet.modeling_pp_lcnet import PPLCNetSqueezeExcitationModule

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.noise import find_state
from hf_quantnoise.noise.squeeze_excitation import squeeze_excitation_layers
from hf_quantnoise.structure import find_layers


class TimmSqueezeExcite(nn.Module):
    """As in timm: pooling is a mean in forward, the gate is a module."""

    def __init__(self, channels, reduced, gate=nn.Hardsigmoid):
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, reduced, 1), nn.ReLU()
        self.conv_expand, self.gate = nn.Conv2d(reduced, channels, 1), gate()


class SENetModule(nn.Module):
    """As in SENet: linear layers after a pooling."""

    def __init__(self, channels, reduced):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, reduced), nn.ReLU(), nn.Linear(reduced, channels), nn.Sigmoid()
        )


class Bottleneck(nn.Module):
    """A residual block with convolutions around a block of any kind."""

    def __init__(self, inner):
        super().__init__()
        self.conv1, self.inner = nn.Conv2d(8, 16, 3), inner
        self.conv2 = nn.Conv2d(16, 8, 1)


def found_in(model):
    return squeeze_excitation_layers(model, find_layers(model))


@pytest.mark.parametrize(
    ("inner", "names"),
    [
        (TimmSqueezeExcite(16, 4), {"inner.conv_reduce", "inner.conv_expand"}),
        (SENetModule(16, 4), {"inner.fc.0", "inner.fc.2"}),
        (PPLCNetSqueezeExcitationModule(16), {"inner.convolutions.0", "inner.convolutions.2"}),
        (TimmSqueezeExcite(16, 32), set()),  # it widens: a feed-forward part
        (TimmSqueezeExcite(16, 4, nn.ReLU), set()),  # no gate: a bottleneck
        (TimmSqueezeExcite(12, 4), set()),  # not of the channels around it
    ],
)
def test_block_is_found_by_its_form(inner, names):
    assert found_in(Bottleneck(inner)) == names


def test_autoencoder_is_no_squeeze_excitation():
    inner = nn.Sequential(nn.Linear(16, 4), nn.Sigmoid(), nn.Linear(4, 16), nn.Sigmoid())
    assert not found_in(nn.Sequential(nn.Linear(8, 16), inner, nn.Linear(16, 8)))
    assert not found_in(nn.Sequential(inner))


def make_regnet():
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8}
    return RegNetForImageClassification(RegNetConfig(**sizes, layer_type="y", num_labels=4))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: make_vision_model("efficientnet"), "EfficientNetSqueezeExciteLayer"),
        (make_regnet, "RegNetSELayer"),
    ],
)
def test_squeeze_excitation_gets_no_noise_by_default(make, kind):
    model = make()
    blocks = [name for name, each in model.named_modules() if type(each).__name__ == kind]
    expected = {
        layer.name
        for layer in find_layers(model)
        if any(layer.name.startswith(f"{block}.") for block in blocks)
    }
    assert len(expected) == 2 * len(blocks) > 0
    apply_quant_noise(model, QuantNoiseConfig(noise="int4", p=0.5))
    state = find_state(model)
    listed = {name for name, why in state.left_clean.items() if "squeeze-and-excitation" in why}
    assert listed == expected
    assert not expected & state.layers.keys()
    assert len(state.layers) + len(expected) == len(find_layers(model))
    model.train()(pixel_values=torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert state.note_unreached() == []


def test_target_modules_can_name_squeeze_excitation():
    model = apply_quant_noise(make_regnet(), QuantNoiseConfig(noise="int4", target_modules=".*"))
    assert len(find_state(model).layers) == len(find_layers(model))
