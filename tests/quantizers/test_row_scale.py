"""row_scale: fit, float16 storage, gradients, and error at equal bytes."""

import pytest
import torch
from support.stored import layers_of_stages
from support.tiny import make_model, make_vision_model
from torch import nn

from hf_quantnoise import IPQConfig, quantize_model
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.modeling.importance import measure_importance
from hf_quantnoise.quantizers import ProductQuantizer


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(quantizer, matrix, importance=None):
    """Return the squared error in float64, from the definition of decode."""
    state = quantizer.fit(matrix, importance=importance)
    codes = quantizer.encode(matrix, state, importance)
    codebook = quantizer.centroids(state).double()
    decoded = codebook[codes.long()].flatten(1)
    if quantizer.row_scale:
        decoded = decoded * state["row_scale"].half().double()
    squares = (decoded - matrix.double()).square()
    return float((squares if importance is None else importance * squares).sum())


def test_row_scale_helps_rows_of_different_norms():
    """Float16 centroids offset the bytes of the scales."""
    matrix = normal(96, 256) * normal(96, 1, seed=1).mul(1.5).exp()
    scaled = ProductQuantizer(block_size=4, n_centroids=32, codebook_bits=16, row_scale=True)
    unscaled = ProductQuantizer(block_size=4, n_centroids=32)
    codes = 96 * 64 * 5 // 8
    assert scaled.packed_bytes(96, 256) == codes + 32 * 4 * 2 + 96 * 2
    assert scaled.packed_bytes(96, 256) <= unscaled.packed_bytes(96, 256) == codes + 32 * 4 * 4
    assert error_of(scaled, matrix) < 0.8 * error_of(unscaled, matrix)


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_row_scale_is_not_worse_on_similar_rows(bits, dtype):
    matrix = normal(96, 64).to(dtype)
    errors = [
        error_of(ProductQuantizer(4, 32, bits, row_scale=scaled), matrix)
        for scaled in (False, True)
    ]
    assert errors[1] < 1.01 * errors[0]


def test_importance_lowers_the_weighted_error():
    matrix = normal(96, 64) * normal(96, 1, seed=1).exp()
    importance = normal(1, 64, seed=2).mul(1.5).exp()
    quantizer = ProductQuantizer(4, 32, row_scale=True)
    unscaled = quantizer.fit(matrix)
    squares = (quantizer.quantize(matrix, unscaled) - matrix).double().square()
    assert error_of(quantizer, matrix, importance) < 0.8 * float((importance * squares).sum())


def test_scale_is_the_least_squares_solution():
    matrix = normal(96, 64) * normal(96, 1, seed=1).exp()
    quantizer = ProductQuantizer(4, 32, row_scale=True, n_iter=100)
    state = quantizer.fit(matrix)
    codebook = state["codebook"].double()
    codes = quantizer.encode(matrix, state).long()
    decoded, exact = codebook[codes].flatten(1), matrix.double()
    expected = (decoded * exact).sum(1) / decoded.square().sum(1)
    # Encoding after the last scale update may change the codes of a few blocks.
    apart = (state["row_scale"][:, 0].double() / expected - 1).abs()
    assert apart.median() < 0.005 and apart.max() < 0.1


@pytest.mark.parametrize("factor", [1e-12, 1e6])
def test_zero_and_tiny_rows(factor):
    matrix = normal(96, 64)
    matrix[3] = 0
    matrix[7] *= 1e-25
    matrix = matrix * factor
    quantizer = ProductQuantizer(4, 32, row_scale=True)
    decoded = quantizer.quantize(matrix, quantizer.fit(matrix))
    assert torch.isfinite(decoded).all() and not decoded[3].any()
    squares = (decoded - matrix).double().square().sum()
    assert squares < 0.6 * matrix.double().square().sum()
    zeros = torch.zeros(96, 64)
    assert not quantizer.quantize(zeros, quantizer.fit(zeros)).any()


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_gradients_of_scales_and_centroids(kind):
    """From the dense gradient in float64: ds_r = <g_r, centroids_r>, dc = mean of s_r g_b."""
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
    decoded = layer.weight_codebook.detach().double()[codes].flatten(1)
    expected = (dense.grad * decoded).sum(1, keepdim=True)
    torch.testing.assert_close(layer.weight_row_scale.grad.double(), expected, rtol=1e-4, atol=1e-4)
    scale = layer.weight_row_scale.detach().half().double()
    blocks, flat = (dense.grad * scale).reshape(-1, 4), codes.flatten()
    centroids = torch.stack([blocks[flat == k].mean(0) for k in range(8)])
    torch.testing.assert_close(layer.weight_codebook.grad.double(), centroids, rtol=1e-3, atol=1e-4)


def test_depthwise_convolutions_have_a_scale_per_channel():
    model = make_vision_model("mobilenet-v2")
    pixels = normal(2, 3, 32, 32)
    config = IPQConfig(n_centroids=16, stages=["conv"], row_scale=True, importance="activations")
    model = quantize_model(
        model, config, progress=False, calibration_data=[{"pixel_values": pixels}]
    )
    layers = layers_of_stages(model)
    assert any(layer.groups > 1 for layer in layers)
    assert all(layer.weight_row_scale.shape == (layer.rows, 1) for layer in layers)
    assert torch.isfinite(model(pixels).logits).all()


def test_tied_head_with_importance():
    model = make_model("gpt2")
    table, head = model.transformer.wte, model.lm_head
    ids = [{"input_ids": torch.arange(20)[None]}]
    (importance,) = measure_importance(model, [[table, head]], ids)
    pack_layer([table, head], ProductQuantizer(4, 16, row_scale=True), importance=importance)
    assert table.weight_row_scale is head.weight_row_scale


def test_invalid_row_scale_raises():
    with pytest.raises(ValueError, match=r"row_scale.*'yes'"):
        IPQConfig(row_scale="yes")
