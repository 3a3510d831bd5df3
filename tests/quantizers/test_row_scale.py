"""A scale per row beside the codebook: fitted, stored in float16, trained, worth its bytes."""

import pytest
import torch
from support.tiny import make_model, make_vision_model
from torch import nn

from hf_quantnoise import IPQConfig, quantize_model, size_report
from hf_quantnoise.modeling import pack_layer, packed_layers
from hf_quantnoise.modeling.importance import measure_importance
from hf_quantnoise.quantizers import ProductQuantizer


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(quantizer, matrix, importance=None):
    """Squared error in float64, of the decoded matrix written out by hand."""
    state = quantizer.fit(matrix, importance=importance)
    codes = quantizer.encode(matrix, state, importance)
    codebook = quantizer.centroids(state).double()
    decoded = codebook[codes.long()].flatten(1)
    if quantizer.row_scale:
        decoded = decoded * state["row_scale"].half().double()
    lost = (decoded - matrix.double()).square()
    return float((lost if importance is None else importance * lost).sum())


def test_rows_of_very_different_norms_are_nearer_at_equal_bytes():
    """Equal bytes: float16 centroids pay for the scales."""
    matrix = normal(96, 256) * normal(96, 1, seed=1).mul(1.5).exp()
    scaled = ProductQuantizer(block_size=4, n_centroids=32, codebook_bits=16, row_scale=True)
    plain = ProductQuantizer(block_size=4, n_centroids=32)
    codes = 96 * 64 * 5 // 8
    assert scaled.packed_bytes(96, 256) == codes + 32 * 4 * 2 + 96 * 2
    assert scaled.packed_bytes(96, 256) <= plain.packed_bytes(96, 256) == codes + 32 * 4 * 4
    assert error_of(scaled, matrix) < 0.8 * error_of(plain, matrix)


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_no_worse_on_rows_that_are_alike(bits, dtype):
    matrix = normal(96, 64).to(dtype)
    errors = [
        error_of(ProductQuantizer(4, 32, bits, row_scale=scaled), matrix)
        for scaled in (False, True)
    ]
    assert errors[1] < 1.01 * errors[0]


def test_importance_weighs_the_scaled_error():
    matrix = normal(96, 64) * normal(96, 1, seed=1).exp()
    importance = normal(1, 64, seed=2).mul(1.5).exp()
    quantizer = ProductQuantizer(4, 32, row_scale=True)
    plain = quantizer.fit(matrix)
    lost = (quantizer.quantize(matrix, plain) - matrix).double().square()
    assert error_of(quantizer, matrix, importance) < 0.8 * float((importance * lost).sum())


def test_the_scale_is_the_least_squares_one_for_its_codewords():
    matrix = normal(96, 64) * normal(96, 1, seed=1).exp()
    quantizer = ProductQuantizer(4, 32, row_scale=True, n_iter=100)
    state = quantizer.fit(matrix)
    codebook = state["codebook"].double()
    codes = quantizer.encode(matrix, state).long()
    words, exact = codebook[codes].flatten(1), matrix.double()
    expected = (words * exact).sum(1) / words.square().sum(1)
    # Codes are chosen once more after the scale was set: a few blocks at the border may move.
    apart = (state["row_scale"][:, 0].double() / expected - 1).abs()
    assert apart.median() < 0.005 and apart.max() < 0.1


@pytest.mark.parametrize("factor", [1e-12, 1e6])
def test_zero_rows_and_rows_far_from_the_rest(factor):
    matrix = normal(96, 64)
    matrix[3] = 0
    matrix[7] *= 1e-25
    matrix = matrix * factor
    quantizer = ProductQuantizer(4, 32, row_scale=True)
    decoded = quantizer.quantize(matrix, quantizer.fit(matrix))
    assert torch.isfinite(decoded).all() and not decoded[3].any()
    lost = (decoded - matrix).double().square().sum()
    assert lost < 0.6 * matrix.double().square().sum()
    zeros = torch.zeros(96, 64)
    assert not quantizer.quantize(zeros, quantizer.fit(zeros)).any()


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_gradients_reach_scales_and_centroids(kind):
    """From the dense gradient in float64: ds_r = <g_r, codewords_r>, dc = mean of s_r g_b."""
    layer = nn.Linear(32, 48, bias=False) if kind == "linear" else nn.Embedding(48, 32)
    layer.weight.data = normal(48, 32) * normal(48, 1, seed=1).exp()
    quantizer = ProductQuantizer(4, 8, row_scale=True)
    pack_layer(layer, quantizer)
    inputs = normal(5, 32) if kind == "linear" else torch.tensor([[0, 3, 3], [47, 8, 0]])
    dense = layer.weight.detach().double().requires_grad_()
    used = inputs.double() @ dense.t() if kind == "linear" else dense[inputs]
    upstream = normal(*used.shape, seed=4)
    (used * upstream).sum().backward()
    (layer(inputs) * upstream).sum().backward()
    codes = layer.codes().long()
    words = layer.weight_codebook.detach().double()[codes].flatten(1)
    expected = (dense.grad * words).sum(1, keepdim=True)
    torch.testing.assert_close(layer.weight_row_scale.grad.double(), expected, rtol=1e-4, atol=1e-4)
    scale = layer.weight_row_scale.detach().half().double()
    blocks, flat = (dense.grad * scale).reshape(-1, 4), codes.flatten()
    centroids = torch.stack([blocks[flat == k].mean(0) for k in range(8)])
    torch.testing.assert_close(layer.weight_codebook.grad.double(), centroids, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "bits"), [("bert", 32), ("bert-mlm", 8), ("gpt2", 16)])
def test_a_model_comes_back_bit_equal_after_a_step(name, bits, input_ids, tmp_path):
    config = IPQConfig(n_centroids=16, row_scale=True, codebook_bits=bits)
    model = quantize_model(make_model(name), config, progress=False)
    assert all("weight_row_scale" in dict(layer.named_parameters(recurse=False))
               for _, layer in packed_layers(model))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(input_ids).logits.square().mean().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert any(n.endswith("row_scale") for n in moved)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    again = type(model).from_pretrained(first)
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)
    again.save_pretrained(second)
    for file in ("model.safetensors", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    size = (first / "model.safetensors").stat().st_size
    assert abs(size_report(again).total.disk_bytes - size) <= 0.01 * size
    with torch.no_grad():
        expected = model(input_ids).logits
        torch.testing.assert_close(again.dequantize()(input_ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_comes_back_bit_equal(dtype, input_ids, tmp_path):
    config = IPQConfig(n_centroids=16, row_scale=True)
    model = quantize_model(make_model("bert").to(dtype), config, progress=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)


def test_depthwise_convolutions_have_a_scale_per_channel():
    model = make_vision_model("mobilenet-v2")
    pixels = normal(2, 3, 32, 32)
    config = IPQConfig(n_centroids=16, stages=["conv"], row_scale=True, importance="activations")
    model = quantize_model(
        model, config, progress=False, calibration_data=[{"pixel_values": pixels}]
    )
    layers = [layer for _, layer in packed_layers(model)]
    assert any(layer.groups > 1 for layer in layers)
    assert all(layer.weight_row_scale.shape == (layer.rows, 1) for layer in layers)
    assert torch.isfinite(model(pixels).logits).all()


def test_a_head_that_is_a_table_too_with_importance():
    model = make_model("gpt2")
    table, head = model.transformer.wte, model.lm_head
    ids = [{"input_ids": torch.arange(20)[None]}]
    (importance,) = measure_importance(model, [[table, head]], ids)
    pack_layer([table, head], ProductQuantizer(4, 16, row_scale=True), importance=importance)
    assert table.weight_row_scale is head.weight_row_scale


def test_a_flag_that_is_none_is_refused():
    with pytest.raises(ValueError, match="row_scale='yes'"):
        IPQConfig(row_scale="yes")
