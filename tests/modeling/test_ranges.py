"""Weights, scales and inputs beyond the range of a dtype are refused by name, never changed."""

import itertools

import pytest
import torch
from support.tiny import make_model
from torch import nn

from hf_quantnoise import (
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
)
from hf_quantnoise.compression.bit_allocation.candidates import candidates_for
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.modeling.importance import measure_importance
from hf_quantnoise.modeling.packer import ModelPacker
from hf_quantnoise.quantizers import AdditiveQuantizer, FixedPointQuantizer, ProductQuantizer
from hf_quantnoise.structure import find_layers

NORMAL = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
LARGE_ROW = torch.cat([NORMAL[:63], NORMAL[63:] * 1e9])
WEIGHTS = {
    "normal": NORMAL,
    "zero": NORMAL * 0,
    "70,000": NORMAL * 3e4,
    "1e10": NORMAL * 1e10,
    "1e18": NORMAL * 1e18,
    "2e19": NORMAL * 2e19,
    "1e38": NORMAL * 5e37,
    "1e-8": NORMAL * 1e-8,
    "1e-30": NORMAL * 1e-30,
    "1e-40": NORMAL * 1e-40,
    "around 1,000": NORMAL + 1000,
    "large row": LARGE_ROW,
    "tiny row": torch.cat([NORMAL[:63], NORMAL[63:] * 1e-9]),
    "one of 1e18": NORMAL.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e18)),
}
QUANTIZERS = {
    **{f"pq {bits}": ProductQuantizer(4, 16, codebook_bits=bits) for bits in (32, 16, 8)},
    **{
        f"row scale {bits}": ProductQuantizer(4, 16, codebook_bits=bits, row_scale=True)
        for bits in (32, 16, 8)
    },
    "additive": AdditiveQuantizer(8, 16, codebook_bits=16),
    "int8": FixedPointQuantizer(8),
    "int8 channel": FixedPointQuantizer(8, "channel"),
    "int4 histogram": FixedPointQuantizer(4, "histogram"),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_weights_are_refused_or_stored_with_the_error_that_is_reported(quantizer):
    """The reference is float64. 560 combinations of weight, quantizer and dtype."""
    method, refused = QUANTIZERS[quantizer], set()
    for (name, values), dtype in itertools.product(WEIGHTS.items(), DTYPES):
        layer = nn.Linear(64, 64, bias=False).to(dtype)
        layer.weight.data = values.to(dtype)
        dense = layer.weight.detach().double()
        if not dense.isfinite().all():
            continue  # refused as such
        if method.check_values(layer.weight.detach()):
            refused.add(name)
            continue
        try:
            reported = pack_layer(layer, method)
        except ValueError:  # the check that follows quantization
            assert type(layer) is nn.Linear and torch.equal(layer.weight.double(), dense)
            assert dtype == torch.float16, name
            continue
        stored = layer.weight.detach().double()
        energy = float(dense.square().sum())
        error = float((stored - dense).square().sum()) / energy if energy else 0.0
        assert reported == pytest.approx(error, rel=1e-2, abs=1e-6), (name, dtype)
        assert error < 0.9, (name, dtype)  # something of the weight is left
        # As written to a file: the same values.
        file = method.from_storage(method.to_storage(layer.state))
        for key, value in layer.state.items():
            if dtype != torch.float64 and key not in ("codebook", "row_scale"):
                assert torch.equal(file[key].to(dtype), value), (name, dtype, key)
    assert "normal" not in refused and "zero" not in refused
    assert {"1e18", "2e19", "1e38", "1e-30", "one of 1e18"} <= refused


REFUSED = {
    "squares": (2e19, FixedPointConfig(), "expected 1e-16 to 1e[+]16"),
    "row scales": (
        1e12, IPQConfig(n_centroids=8, row_scale=True, codebook_bits=32), "set row_scale=False"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_value_out_of_range_is_refused_by_name(name):
    value, config, words = REFUSED[name]
    model = make_model("bert")
    layer = model.bert.encoder.layer[1].output.dense
    layer.weight.data[3, 5] = value
    pattern = rf"invalid bert\.encoder\.layer\.1\.output\.dense\.weight: .*{words}.*exclude_modules"
    with pytest.raises(ValueError, match=pattern):
        quantize_model(model, config, progress=False)
    config.exclude_modules = ["layer.1.output.dense"]  # the way out of the message
    quantize_model(model, config, progress=False)
    assert layer.weight.max().item() == pytest.approx(value)


def scaled(factor):
    """Return a model with one layer whose weights are scaled."""
    model = make_model("bert")
    layer = model.bert.encoder.layer[1].output.dense
    layer.weight.data *= factor / layer.weight.abs().max()
    return model


SCALED = "bert.encoder.layer.1.output.dense"
TWO_BOOKS = IPQConfig(block_size=8, n_centroids=8, n_codebooks=2)
BY_DEFAULT = IPQConfig(n_centroids=8)


@pytest.mark.parametrize(
    ("factor", "config"),
    [(1e-5, BY_DEFAULT), (1e-9, BY_DEFAULT), (7e4, BY_DEFAULT), (4e4, TWO_BOOKS)],
)
def test_weights_beyond_float16_have_32_bit_centroids(factor, config, tmp_path, caplog):
    dense = scaled(factor).get_submodule(SCALED).weight.detach().double()
    model = quantize_model(scaled(factor), config, progress=False)
    assert f"32 bits, since float16 cannot hold their values: {SCALED}" in caplog.text
    plan = model.config.quantization_config.plan
    by_bits = {name for name, entry in plan.items() if entry.get("codebook_bits") == 32}
    assert by_bits == {SCALED}
    normal = quantize_model(scaled(1.0), config, progress=False).get_submodule(SCALED)
    normal_weight = scaled(1.0).get_submodule(SCALED).weight.detach().double()
    errors = [
        float((layer.weight.detach().double() - weight).norm() / weight.norm())
        for layer, weight in ((model.get_submodule(SCALED), dense), (normal, normal_weight))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_submodule(SCALED).weight, model.get_submodule(SCALED).weight)


def test_resumed_run_has_the_quantizers_of_its_plan():
    """Training may move weights out of the range after the check of the dense model."""
    packer = ModelPacker(scaled(7e4), BY_DEFAULT)
    packer.pack_all()
    resumed = ModelPacker(scaled(1.0), BY_DEFAULT)
    resumed.restore_stages(resumed.stages, packer.config.plan)
    assert resumed.config.plan == packer.config.plan
    assert resumed.model.get_submodule(SCALED).quantizer.codebook_bits == 32


def test_bit_allocation_counts_32_bit_centroids():
    layers = {layer.name: layer for layer in find_layers(scaled(1e-5))}
    bits = {
        name: {
            candidate.settings["codebook_bits"]
            for candidate in candidates_for((layers[name],), BY_DEFAULT).candidates
            if candidate.settings["scheme"] == "pq"
        }
        for name in (SCALED, "bert.encoder.layer.0.output.dense")
    }
    assert list(bits.values()) == [{32}, {16}]


def test_noise_has_32_bit_centroids_where_it_needs_them():
    settings = {"noise": "pq", "p": 1.0, "learn_codebooks": True}
    model = scaled(1e-9)
    layer = model.get_submodule(SCALED)
    apply_quant_noise(model, QuantNoiseConfig.matching(BY_DEFAULT, model, **settings)).train()
    inputs = torch.randn(4, 64)
    noisy = layer(inputs) - layer.bias
    quantize_model(model, BY_DEFAULT, progress=False)
    assert noisy.any() and torch.equal(noisy, layer(inputs) - layer.bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_inputs_out_of_range_are_named(value):
    layer = nn.Linear(8, 4)
    inputs = torch.ones(2, 8)
    inputs[0, 3] = value
    with pytest.raises(ValueError, match=r"inputs of the layer .* NaN, infinite or too"):
        measure_importance(layer, [[layer]], [inputs], layer)


def test_input_scale_beyond_float16_is_named():
    model = make_model("bert").to(torch.float16)
    table = model.bert.embeddings.word_embeddings
    embeddings = torch.full((1, 4, 32), 1.0, dtype=torch.float16)
    with torch.no_grad():  # inputs of the first layers in a small range far from zero
        model.bert.embeddings.LayerNorm.weight.zero_()
        model.bert.embeddings.LayerNorm.weight[0] = 2.0
        model.bert.embeddings.LayerNorm.bias.fill_(2000.0)
    assert table.weight.dtype == torch.float16
    config = FixedPointConfig(activation_bits=8, target_modules=r".*layer\.0.*(query|key)")
    with pytest.raises(ValueError, match=r"activation_bits: the input (scale|zero_point) of bert"):
        quantize_model(model, config, False, [{"inputs_embeds": embeddings}])
