"""Invariants of noise on tiny models of real architectures, some with tied heads."""

import pytest
import torch
from support.tiny import recompute, with_dropout
from torch import nn
from transformers import AutoConfig, set_seed

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise, remove_quant_noise
from hf_quantnoise.blocks import weight_matrix
from hf_quantnoise.noise import find_state

KINDS = ["proxy", "pq", "int8", "int4", ["pq", "int8"]]


def config(noise="proxy", p=0.1, **fields) -> QuantNoiseConfig:
    return QuantNoiseConfig(noise=noise, p=p, n_centroids=16, **fields)


def logits(model, input_ids, seed: int = 0) -> torch.Tensor:
    set_seed(seed)
    model.config.use_cache = False  # as in recomputation: GPT-2 rounds differently with a cache
    return model(input_ids=input_ids).logits


def gradients(model, input_ids, seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits(model, input_ids, seed).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("noise", KINDS, ids=str)
def test_weights_are_bit_equal_after_forwards(model, input_ids, noise):
    before = snapshot(model)
    apply_quant_noise(model.train(), config(noise))
    for seed in range(20):
        logits(model, input_ids, seed)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("noise", KINDS, ids=str)
def test_p_0_and_eval_are_bit_equal_to_the_dense_model(model, input_ids, noise):
    expected = logits(model.train(), input_ids), logits(model.eval(), input_ids)
    apply_quant_noise(model, config(noise, 0.0))
    assert torch.equal(logits(model.train(), input_ids), expected[0])  # same dropout
    find_state(model).p = 1.0
    assert torch.equal(logits(model.eval(), input_ids), expected[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("noise", ["pq", "int8", "int4"])
def test_p_1_is_the_quantized_model(model, input_ids, noise, autocast):
    apply_quant_noise(with_dropout(model.train(), 0.0), config(noise, 1.0))
    quantized = {}
    for weight in find_state(model).weights:
        ((_, function),) = weight.noise.functions
        matrix = weight_matrix(weight.modules[0])
        quantized[weight.modules[0]] = function.quantizer.quantize(matrix, function.state)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        noisy = logits(model, input_ids)
        remove_quant_noise(model)
        for module, matrix in quantized.items():
            weight_matrix(module).copy_(matrix)
        assert torch.equal(noisy, logits(model, input_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", ["proxy", "pq", "int8"])
def test_half_precision_models_train_with_noise(model, input_ids, noise, dtype):
    apply_quant_noise(model.to(dtype).train(), config(noise, 0.5))
    assert logits(model, input_ids).dtype == dtype
    assert all(gradient.isfinite().all() for gradient in gradients(model, input_ids).values())


@pytest.mark.parametrize("noise", ["proxy", "pq", "int4"])
def test_gradients_reach_every_weight(model, input_ids, noise):
    dense = gradients(with_dropout(model.train(), 0.0), input_ids)
    apply_quant_noise(model, config(noise, 0.3))
    noisy = gradients(model, input_ids)
    assert noisy.keys() == dense.keys()
    for name, gradient in noisy.items():
        assert gradient.isfinite().all()
        if dense[name].norm() > 0:
            assert gradient.norm() > 0, name


def test_seed_reproduces_the_noise(model, input_ids):
    apply_quant_noise(with_dropout(model.train(), 0.0), config("proxy", 0.3))
    assert torch.equal(logits(model, input_ids, 1), logits(model, input_ids, 1))
    assert not torch.equal(logits(model, input_ids, 1), logits(model, input_ids, 2))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("noise", ["proxy", ["pq", "int8"]], ids=str)
def test_recomputation_sees_the_same_mask(model, input_ids, noise, use_reentrant):
    apply_quant_noise(model.train(), config(noise, 0.3))  # with dropout, as in real training
    expected = gradients(model, input_ids)
    recompute(model, use_reentrant)
    recomputed = gradients(model, input_ids)
    assert recomputed.keys() == expected.keys()
    for name, gradient in recomputed.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_tied_layers_see_the_same_mask(use_reentrant):
    class Layer(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Layer(16, 16) for _ in range(3))
            self.layers[2].weight = self.layers[0].weight

        def forward(self, x, recompute):
            for layer in self.layers:
                x = (
                    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
                    if recompute
                    else layer(x)
                )
            return x

    model = apply_quant_noise(Model().train(), config("proxy", 0.4, block_size=4))
    x = torch.randn(4, 16, requires_grad=True)
    found = []
    for recompute_layers in (False, True):
        model.zero_grad()
        set_seed(3)
        # Two forwards before the backward.
        (model(x, recompute_layers).sum() + model(2 * x, recompute_layers).sum()).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_all_layers_but_side_tables_get_noise(model):
    apply_quant_noise(model, config("proxy"))
    state = find_state(model)
    tables = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    side = [
        name for name in tables if model.get_submodule(name) is not model.get_input_embeddings()
    ]
    assert list(state.left_clean) == side
    assert all("all-zero vector" in reason for reason in state.left_clean.values())


def test_checkpoints_load_in_plain_transformers(model, input_ids, tmp_path):
    cls, expected = type(model), logits(model, input_ids)
    apply_quant_noise(model.train(), config(["pq", "int8"]))
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == [cls.__name__]
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert find_state(loaded) is None
    assert torch.equal(logits(loaded, input_ids), expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_remove_restores_the_model(model, input_ids):
    parameters = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    expected = logits(model, input_ids)
    apply_quant_noise(model.train(), config(["pq", "int8"], 0.5))
    gradients(model, input_ids)
    assert remove_quant_noise(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name][0] and torch.equal(parameter, parameters[name][1])
    assert torch.equal(logits(model.eval(), input_ids), expected)


def test_autocast_gradients_are_finite_float32(model, input_ids):
    apply_quant_noise(model.train(), config("pq", 0.3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, input_ids)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert all(gradient.isfinite().all() for gradient in found.values())
