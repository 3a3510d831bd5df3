"""Errors and warnings when noise is applied to a model."""

import logging

import pytest
import torch
from support.toy import Toy, noisy_toy
from torch import nn

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.noise import find_state, is_noisy


def test_apply_twice_raises():
    model = noisy_toy()
    for part in (model, nn.Sequential(model), model.up):
        with pytest.raises(ValueError, match=r"call remove_quant_noise\(model\) first"):
            apply_quant_noise(part, QuantNoiseConfig())
    with pytest.raises(TypeError, match=r"qn_config.*dict.*QuantNoiseConfig"):
        apply_quant_noise(Toy(), {"p": 0.1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"block_size": 7},
            r"block_size=7 .*\(32, 48\).* 2, 4, 8, 16",
        ),
        (
            {"block_size": {"attention": 8}},
            "block_size has no entry for its group 'embeddings'",
        ),
        (
            {"noise": "pq", "n_centroids": 4096},
            r"noise='pq' .*5 layers \(words: ",
        ),
        ({"target_modules": ["query"]}, "target_modules='query'"),
        ({"exclude_modules": "words|up|down"}, "target_modules=None"),
    ],
)
def test_no_layer_for_noise_raises_and_changes_nothing(fields, message):
    model = Toy()
    with pytest.raises(ValueError, match=message):
        apply_quant_noise(model, QuantNoiseConfig(**fields))
    assert not any(map(is_noisy, model.modules())) and find_state(model) is None


def test_quantized_model_raises():
    class Packed(nn.Module):
        is_quantized = True

    with pytest.raises(ValueError, match=r"Packed is quantized already.*dequantize"):
        apply_quant_noise(Packed(), QuantNoiseConfig())


def test_skipped_layers_are_logged_once(caplog):
    model = Toy()
    model.narrow = nn.Linear(9, 8)
    model.integer = nn.Linear(32, 8)
    model.integer.weight = nn.Parameter(torch.ones(8, 32, dtype=torch.int8), requires_grad=False)
    model.hooked = nn.Linear(32, 8)
    model.hooked.forward = model.hooked.forward
    model.multi = nn.MultiheadAttention(32, 2)
    with caplog.at_level(logging.WARNING):
        apply_quant_noise(model, QuantNoiseConfig(block_size=8))
    record, bare = caplog.records
    assert "multi.in_proj_weight" in bare.getMessage()
    for reason in (
        "skips 4 layers",
        "narrow: block_size=8 does not divide its 9 columns",
        "integer: its weight is stored as torch.int8",
        "hooked: its forward was replaced",
        "multi.out_proj: nn.MultiheadAttention reads its weight",
    ):
        assert reason in record.getMessage()
    assert {"narrow", "integer", "hooked", "multi.out_proj"} <= find_state(model).left_clean.keys()


def test_layer_may_lack_one_of_several_noises():
    model = noisy_toy(["proxy", "int8"], 1.0, block_size=48)
    state = find_state(model)
    assert "proxy noise: block_size=48 does not divide its 32 columns" in state.left_clean["up"]
    assert "up" in state.layers and "down" not in state.left_clean
    assert (model.down(torch.eye(48)) == model.down.bias).all()
    assert not (model.up(torch.eye(32)) == model.up.bias).all()


def plain_model() -> nn.Sequential:
    """Return a model of torch, without ``get_input_embeddings``."""
    return nn.Sequential(nn.Embedding(60, 32), nn.Linear(32, 48))


def test_tables_of_models_without_input_embeddings_are_logged(caplog):
    with caplog.at_level(logging.WARNING):
        model = apply_quant_noise(plain_model(), QuantNoiseConfig())
    assert list(find_state(model).layers) == ["1"]
    reason = find_state(model).left_clean["0"]
    assert "does not define which table holds its input embeddings" in reason
    (record,) = caplog.records
    for part in ("skips 1 table", "(0)", reason, "target_modules"):
        assert part in record.getMessage()
    with pytest.raises(ValueError, match=r"target_modules=None.* which table holds its input"):
        apply_quant_noise(nn.Sequential(nn.Embedding(60, 32)), QuantNoiseConfig())


@pytest.mark.parametrize("fields", [{"target_modules": ["0", "1"]}, {"noise": "int8"}])
def test_tables_of_models_without_input_embeddings_can_get_noise(fields, caplog):
    with caplog.at_level(logging.WARNING):
        model = apply_quant_noise(plain_model(), QuantNoiseConfig(**fields))
    assert list(find_state(model).layers) == ["0", "1"] and not caplog.records
