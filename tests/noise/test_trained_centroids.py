"""Centroids that are trained with the model: their gradients, and codes that follow."""

import pytest
import torch
from support.toy import IDS, Toy
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.blocks import to_blocks, weight_matrix
from hf_quantnoise.noise import find_state

BLOCK = 4


def noisy(layer, p):
    """Return a model of one layer with trained centroids, and its noise."""
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    config = QuantNoiseConfig(
        noise="pq", p=p, block_size=BLOCK, n_centroids=8, learn_codebooks=True, target_modules=".*"
    )
    model = apply_quant_noise(nn.Sequential(layer), config).train()
    (weight,) = find_state(model).weights
    return model, weight.noise.functions[0][1]


LAYERS = {
    "linear": (lambda: nn.Linear(16, 24), lambda: torch.randn(5, 16)),
    "conv1d": (lambda: Conv1D(24, 16), lambda: torch.randn(5, 16)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 1), lambda: torch.randn(2, 8, 3, 3)),
    "embedding": (lambda: nn.Embedding(30, 16), lambda: torch.tensor([[3, 4, 3, 9, 4, 3]])),
}


@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_centroid_gradient_is_the_mean_over_its_noised_blocks(name, p):
    make, inputs = LAYERS[name]
    model, noise = noisy(make(), p)
    layer = model[0]
    seen = {}
    decode, replace = noise.decode, noise.replace
    noise.decode = lambda device, rows: (seen.update(rows=rows), decode(device, rows))[1]
    noise.replace = lambda *args: (seen.update(chosen=args[1]), replace(*args))[1]
    torch.manual_seed(1)
    output = model(inputs())
    output.square().sum().backward()
    dense = weight_matrix(layer, layer.weight.grad).double()
    codes = noise.state["codes"]
    if name == "embedding":
        # A repeated row has the noise of its first occurrence.
        mask = torch.zeros(layer.num_embeddings, codes.shape[1], dtype=torch.bool)
        rows, chosen = seen["rows"], seen["chosen"].as_mask().view(-1, codes.shape[1])
        for position in reversed(range(len(rows))):
            mask[rows[position]] = chosen[position] if not seen["chosen"].is_full else True
    else:
        mask = seen["chosen"].as_mask()
    expected = torch.zeros(8, BLOCK, dtype=torch.float64)
    for block, code, noised in zip(
        to_blocks(dense, BLOCK), codes.reshape(-1).tolist(), mask.reshape(-1), strict=True
    ):
        expected[code] += block * noised
    counts = torch.bincount(codes.reshape(-1).int(), minlength=8)
    expected /= counts[:, None].clamp(min=1)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(
        noise.state["codebook"].grad.double(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("p", [0.999999, 1.0])
def test_gradients_of_looked_up_rows_are_those_of_the_table(p, padding_idx):
    """Padding trains neither the table nor the centroids."""
    gradients = []
    ids = torch.tensor([3, 4, 3, 9, 4, 3])
    for more in (0, 30):  # with more ids, the complete table gets noise
        model, noise = noisy(nn.Embedding(30, 16, padding_idx=padding_idx), p)
        output = model(torch.cat([ids, ids[:1].repeat(more)]))
        output[: len(ids)].square().sum().backward()
        gradients.append((model[0].weight.grad, noise.state["codebook"].grad))
    for of_rows, of_table in zip(*gradients, strict=True):
        assert of_rows.abs().max() > 0.01
        torch.testing.assert_close(of_rows, of_table)
    padding = torch.full((6,), 3)
    model, noise = noisy(nn.Embedding(30, 16, padding_idx=padding_idx), p)
    model(padding).square().sum().backward()
    assert bool(noise.state["codebook"].grad.any()) == (padding_idx is None)


def test_weight_gradient_is_that_of_fixed_centroids():
    gradients = []
    for learn in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(16, 24)
        config = QuantNoiseConfig(
            noise="pq", p=0.4, block_size=BLOCK, n_centroids=8, learn_codebooks=learn
        )
        model = apply_quant_noise(nn.Sequential(layer), config).train()
        torch.manual_seed(1)
        model(torch.randn(5, 16)).square().sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def test_a_refresh_renews_codes_and_keeps_centroids():
    model, noise = noisy(nn.Linear(16, 24), 1.0)
    codebook, old = noise.state["codebook"], noise.state["codes"].clone()
    before = codebook.detach().clone()
    with torch.no_grad():
        model[0].weight += 0.3 * torch.randn_like(model[0].weight)
    find_state(model).refresh_codebooks()
    assert noise.state["codebook"] is codebook
    assert torch.equal(codebook, before)
    distances = torch.cdist(to_blocks(model[0].weight, BLOCK).double(), before.double())
    assert torch.equal(noise.state["codes"].reshape(-1).long(), distances.argmin(1))
    assert not torch.equal(noise.state["codes"], old)


@pytest.mark.parametrize("action", ["forward", "refresh"])
def test_centroids_stay_the_parameters_of_an_optimizer_on_another_device(action, monkeypatch):
    model, noise = noisy(nn.Linear(16, 24), 0.5)
    model(torch.randn(5, 16)).square().sum().backward()
    (codebook,) = find_state(model).parameters()
    value, gradient = codebook.detach().clone(), codebook.grad.clone()
    devices = []
    original = noise._state_on

    def other_device(device):
        """Have the state moved: "cpu:0" is the CPU and not equal to the device of its tensors."""
        devices.append(device)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: tensor.clone())
            return original(torch.device("cpu:0"))

    monkeypatch.setattr(noise, "_state_on", other_device)
    if action == "forward":
        model(torch.randn(5, 16))
    else:
        find_state(model).refresh_codebooks()
    assert devices and set(devices) == {model[0].weight.device}
    assert find_state(model).parameters() == [codebook] and noise.state["codebook"] is codebook
    assert torch.equal(codebook, value) and torch.equal(codebook.grad, gradient)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"learn_codebooks": True},
        {"learn_codebooks": True, "row_scale": True, "codebook_bits": 8, "n_codebooks": 2},
        {"learn_codebooks": False, "activation_bits": 8, "activation_calibration": 2},
    ],
)
def test_inference_mode_equals_no_grad_and_leaves_noise_that_can_be_trained(p, fields):
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        config = QuantNoiseConfig(noise="pq", p=p, n_centroids=8, block_size=BLOCK, **fields)
        model = apply_quant_noise(Toy().train(), config)
        with torch.no_grad():
            for parameter in find_state(model).parameters():
                parameter.mul_(1.1)  # 8-bit centroids are rounded with a new scale
        torch.manual_seed(1)
        with mode():
            outputs = [model(IDS.clone()), model(IDS.clone())]
        outputs.append(model(IDS))
        outputs[-1].square().sum().backward()
        trained = [*model.parameters(), *find_state(model).parameters()]
        results.append([*outputs, *(each.grad for each in trained)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
