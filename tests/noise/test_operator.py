"""psi: noisy values forward, straight-through gradients, unchanged weights."""

import pytest
import torch
from support.tiny import make_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.blocks import weight_matrix
from hf_quantnoise.configuration import NOISES
from hf_quantnoise.layer_types import layer_type_of
from hf_quantnoise.noise import find_state
from hf_quantnoise.noise.operator import WeightNoise
from hf_quantnoise.quantizers.base import StraightThrough

LAYERS = {
    "linear": lambda: nn.Linear(32, 48),
    "conv1d": lambda: Conv1D(48, 32),
    "embedding": lambda: nn.Embedding(48, 32),
}


def make_layer(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    nn.init.normal_(layer.weight)
    return layer.to(dtype)


def noise_for(layer, noise="proxy", p=0.5, members=1, **fields) -> WeightNoise:
    config = QuantNoiseConfig(noise=noise, p=p, n_centroids=16, **fields)
    rows, columns = weight_matrix(layer).shape
    functions = []
    for index, (name, _) in enumerate(config.noises):
        function = NOISES[name](name, config, config.block_size, config.n_centroids)
        function.refresh(weight_matrix(layer), seed=0)
        functions.append((index, function))
    return WeightNoise(functions, [rate for _, rate in config.noises], rows, columns, members)


def psi(noise: WeightNoise, layer: nn.Module, member: int = 0) -> torch.Tensor:
    return noise.noisy_weight(layer.weight, layer_type_of(layer), member)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("layer", LAYERS)
def test_proxy_zeroes_complete_blocks_along_the_inputs(layer, p):
    layer = make_layer(layer)
    noisy = weight_matrix(layer, psi(noise_for(layer, p=p), layer))
    blocks = noisy.reshape(-1, 8)
    zero = (blocks == 0).all(1)
    assert 0 < zero.sum() < len(zero)
    assert not (blocks[~zero] == 0).any()
    assert torch.equal(blocks[~zero], weight_matrix(layer).reshape(-1, 8)[~zero])


def test_straight_through_saves_nothing_for_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        weight = torch.zeros(3, requires_grad=True)
        out = StraightThrough.apply(weight, torch.ones(3))
    assert saved == []
    assert torch.equal(out, torch.ones(3)) and out.requires_grad


def test_frozen_weight_needs_no_gradient():
    layer = make_layer("linear").requires_grad_(False)
    noisy = psi(noise_for(layer), layer)
    assert not noisy.requires_grad and not torch.equal(noisy, layer.weight)


def test_autocast_does_not_change_the_codes():
    layer = make_layer("linear")
    noise = noise_for(layer, "pq", 1.0)
    expected = psi(noise, layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(psi(noise, layer), expected)
        rows = noise.noisy_rows(layer.weight[:5], torch.arange(5))
    assert torch.equal(rows, expected[:5])


def lookup(noise: WeightNoise, layer: nn.Embedding, ids: torch.Tensor, member: int = 0):
    return noise.noisy_rows(layer(ids), ids, member)


@pytest.mark.parametrize("noise", ["proxy", "pq", "int4", "mean"])
@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize("members", [1, 2])
def test_repeated_rows_have_the_same_noise(noise, p, members):
    layer = make_layer("embedding")
    ids = torch.tensor([[3, 9, 3, 3], [9, 0, 47, 3]])
    torch.manual_seed(1)
    out = lookup(noise_for(layer, noise, p, members), layer, ids)
    assert out.shape == (2, 4, 32)
    for row in ids.unique():
        same = out[ids == row]
        assert torch.equal(same, same[:1].expand_as(same))
    assert not torch.equal(out, layer(ids))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_lookup_noise_share_is_p(p):
    layer = make_layer("embedding")
    noise, ids = noise_for(layer, "proxy", p), torch.arange(48).repeat(3)
    blocks = torch.stack([lookup(noise, layer, ids)[:48].view(-1, 8) for _ in range(300)])
    share = float((blocks == 0).all(-1).float().mean())
    assert abs(share - p) < 6 * (p * (1 - p) / (300 * 192)) ** 0.5


@pytest.mark.parametrize("noise", ["pq", "int8"])
@pytest.mark.parametrize("members", [1, 2])
def test_lookup_at_p_1_equals_the_quantized_rows(noise, members):
    layer = make_layer("embedding")
    operator = noise_for(layer, noise, 1.0, members)
    function = operator.functions[0][1]
    quantized = function.quantizer.quantize(layer.weight.detach(), function.state)
    ids = torch.tensor([5, 1, 5, 30])
    assert torch.equal(lookup(operator, layer, ids), quantized[ids])


def test_tied_lookup_and_table_share_one_mask():
    layer = make_layer("embedding")
    noise = noise_for(layer, ["proxy", "int4"], 0.4, members=2)
    ids = torch.tensor([3, 3, 20, 7])
    for _ in range(3):
        rows = lookup(noise, layer, ids, member=0)
        table = psi(noise, layer, member=1)
        assert torch.equal(rows, table[ids])


def test_lookup_gradient_is_the_dense_one():
    layer, other = make_layer("embedding"), make_layer("embedding")
    ids, dy = torch.tensor([3, 9, 3, 0]), torch.randn(4, 32)
    lookup(noise_for(layer, "proxy", 0.5), layer, ids).backward(dy)
    other(ids).backward(dy)
    assert torch.equal(layer.weight.grad, other.weight.grad)


def test_resized_weight_raises():
    layer = make_layer("linear")
    noise = noise_for(layer)
    with pytest.raises(RuntimeError, match=r"\(50, 32\).*\(48, 32\)"):
        noise.noisy_weight(torch.zeros(50, 32), layer_type_of(layer))


@pytest.mark.parametrize("action", ["old ids", "new ids", "all ids", "codebooks", "scales"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_resized_embeddings_raise(name, action):
    """Rows that are looked up, the complete table (for many ids) and a refresh; tied or not."""
    model = make_model(name).train()
    config = QuantNoiseConfig(noise=["pq", "int8"], p=0.5, n_centroids=8)
    rows = apply_quant_noise(model, config).get_input_embeddings().num_embeddings
    model.resize_token_embeddings(rows + 10)
    ids = {
        "old ids": torch.tensor([[1, 2]]),
        "new ids": torch.tensor([[1, rows + 5]]),
        "all ids": torch.arange(rows + 10).view(-1, 10),
    }
    with pytest.raises(RuntimeError, match=rf"{rows + 10}, .*{rows}, .*remove_quant_noise"):
        if action in ids:
            model(ids[action])
        else:
            getattr(find_state(model), f"refresh_{action}")()
