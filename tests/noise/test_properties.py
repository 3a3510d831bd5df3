"""Properties of section 4 for every noise, layer type and observer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise, remove_quant_noise
from hf_quantnoise.blocks import to_blocks, weight_matrix
from hf_quantnoise.layer_types import layer_type_of
from hf_quantnoise.noise import find_state
from hf_quantnoise.noise.block_mask import sample_mask

LAYERS = {
    "linear": lambda: nn.Linear(16, 24),
    "conv1d": lambda: Conv1D(24, 16),
    "embedding": lambda: nn.Embedding(24, 16),
    "conv 1x1": lambda: nn.Conv2d(16, 24, 1),
    "conv 3x3": lambda: nn.Conv2d(4, 24, 3, stride=2, padding=1),
    "grouped 3x3": lambda: nn.Conv2d(8, 24, 3, groups=2),
    "depthwise 5x5": lambda: nn.Conv2d(24, 24, 5, padding=2, groups=24),
}
NOISES = ["proxy", "mean", "pq", *(f"int{bits}" for bits in range(1, 9))]
OBSERVERS = ["minmax", "channel", "histogram"]
DTYPES = [torch.float32, torch.bfloat16]

cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(LAYERS)),
        "observer": st.sampled_from(OBSERVERS),
        "dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 2**31),
    }
)
some_noises = st.lists(st.sampled_from(NOISES), min_size=1, max_size=3)
few = settings(max_examples=60, deadline=None)


def make_layer(case) -> nn.Module:
    torch.manual_seed(case["seed"])
    layer = LAYERS[case["kind"]]()
    nn.init.normal_(layer.weight)
    return layer.to(case["dtype"])


def noisy(layer: nn.Module, noise, p, observer: str) -> nn.Module:
    config = QuantNoiseConfig(
        noise=noise, p=p, block_size=4, n_centroids=6, observer=observer, target_modules=".*"
    )
    return apply_quant_noise(nn.Sequential(layer), config).train()


def functions_of(model: nn.Module) -> list:
    return [function for _, function in find_state(model).weights[0].noise.functions]


def weight_in_use(layer: nn.Module) -> torch.Tensor:
    """Return the noisy weight matrix of one forward."""
    noise = layer._layer_noise.weight
    return weight_matrix(layer, noise.noisy_weight(layer.weight, layer_type_of(layer)))


def inputs_for(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.arange(24)
    shape = (2, layer.in_channels, 6, 6) if isinstance(layer, nn.Conv2d) else (5, 16)
    return torch.randn(shape).to(layer.weight.dtype)


@few
@given(cases, some_noises)
def test_p_0_equals_the_dense_layer(case, noises):
    layer = make_layer(case)
    inputs = inputs_for(layer)
    dense = layer(inputs)
    model = noisy(layer, noises, 0.0, case["observer"])
    state = torch.get_rng_state()
    assert torch.equal(model(inputs), dense)
    assert torch.equal(torch.get_rng_state(), state)


@few
@given(cases, st.sampled_from(NOISES))
def test_p_1_applies_phi_to_every_block(case, noise):
    layer = make_layer(case)
    dense = weight_matrix(layer).clone(memory_format=torch.contiguous_format)
    model = noisy(layer, noise, 1.0, case["observer"])
    (function,) = functions_of(model)
    if noise == "proxy":
        expected = torch.zeros_like(dense)
    elif noise == "mean":
        blocks = to_blocks(dense, function.block_size)
        mean = blocks.double().mean(0).to(torch.float32)
        expected = mean.expand_as(blocks).reshape(dense.shape)
    else:
        expected = function.quantizer.quantize(dense, function.state)
    result = weight_in_use(layer)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if noise == "mean" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(result, expected.to(dense.dtype), **tolerance)


@few
@given(cases, st.sampled_from(NOISES), st.sampled_from([0.05, 0.2, 0.5, 0.9]))
def test_share_of_noised_blocks_is_binomial(case, noise, p):
    layer = make_layer({**case, "dtype": torch.float32})
    dense = weight_matrix(layer).clone(memory_format=torch.contiguous_format)
    model = noisy(layer, noise, p, case["observer"])
    (function,) = functions_of(model)
    size = function.block_size
    # Blocks that phi changes at all: a weight exactly on a quantization level does not move.
    full = dense.clone()
    function.distort(full, sample_mask(dense.numel() // size, 1.0, dense.device))
    movable = (to_blocks(full, size) != to_blocks(dense, size)).any(1)
    rounds, moved = 20, 0
    for _ in range(rounds):
        moved += int((to_blocks(weight_in_use(layer), size) != to_blocks(dense, size)).any(1).sum())
    expected, count = p * int(movable.sum()) * rounds, int(movable.sum()) * rounds
    assert abs(moved - expected) <= 6 * math.sqrt(count * p * (1 - p)) + 1


@few
@given(cases, some_noises, st.sampled_from([0.1, 0.5, 1.0]))
def test_weights_are_unchanged_and_gradients_straight_through(case, noises, p):
    """Eq. 7. The layers are linear in their weight, so its gradient does not depend on its value
    and must be bit-equal to that of the dense layer."""
    layer = make_layer(case)
    inputs, weight = inputs_for(layer), layer.weight
    before, version = weight.detach().clone(), weight._version
    layer(inputs).float().square().mul(0).sum().backward()  # warm-up of the same graph
    weight.grad = None
    output = layer(inputs)
    upstream = torch.randn_like(output)
    output.backward(upstream)
    dense, weight.grad = weight.grad.clone(), None
    model = noisy(layer, noises, p, case["observer"])
    for _ in range(3):
        weight.grad = None
        model(inputs).backward(upstream)
        assert torch.equal(weight.grad, dense)
    assert torch.equal(weight, before) and weight._version == version
    remove_quant_noise(model)
    assert type(layer) is type(LAYERS[case["kind"]]())
    assert torch.equal(layer(inputs), output)


@few
@given(cases, st.lists(st.sampled_from(NOISES), min_size=2, max_size=3, unique=True))
def test_composition_applies_noises_in_order(case, noises):
    """Eq. 8, with a separate J for each noise."""
    layer = make_layer(case)
    model = noisy(layer, noises, [0.4, 0.7, 0.2][: len(noises)], case["observer"])
    functions = functions_of(model)
    torch.manual_seed(case["seed"])
    together = weight_in_use(layer)
    torch.manual_seed(case["seed"])
    expected = weight_matrix(layer).clone(memory_format=torch.contiguous_format)
    counts = [expected.numel() // function.block_size for function in functions]
    rates = [0.4, 0.7, 0.2]
    chosen = [sample_mask(n, p, expected.device) for n, p in zip(counts, rates, strict=False)]
    for function, block_mask in zip(functions, chosen, strict=True):
        function.distort(expected, block_mask)
    assert torch.equal(together, expected)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", LAYERS)
def test_eval_equals_the_dense_layer(kind, noise):
    layer = make_layer({"kind": kind, "dtype": torch.float32, "seed": 0})
    inputs = inputs_for(layer)
    dense = layer(inputs)
    assert torch.equal(noisy(layer, noise, 1.0, "minmax").eval()(inputs), dense)
