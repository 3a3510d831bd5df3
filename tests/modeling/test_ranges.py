"""Weights, scales and inputs beyond the range of a dtype are refused by name, never changed."""

import itertools

import pytest
import torch
from support.tiny import make_model
from torch import nn

from hf_quantnoise import FixedPointConfig, IPQConfig, quantize_model
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.modeling.importance import measure_importance
from hf_quantnoise.quantizers import AdditiveQuantizer, FixedPointQuantizer, ProductQuantizer

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
    "centroids": (7e4, IPQConfig(n_centroids=8, codebook_bits=16), "65504; set codebook_bits=32"),
    "additive": (
        4e4, IPQConfig(n_centroids=8, codebook_bits=16, n_codebooks=2), "codebook_bits=16"
    ),
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
