"""``torch_compile``: values that change from step to step are not constants of a graph."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from support.stacked import make_stacked
from support.stored import tensors_of
from support.trainers import make_trainer
from torch import nn
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
)
from hf_quantnoise.compression import stages
from hf_quantnoise.noise import find_state

COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def effective_weight(layer):
    """Return the weight that a forward uses: the outputs for the unit vectors."""
    return layer(torch.eye(64)).t()


@pytest.mark.parametrize(
    "settings",
    [
        {"noise": "proxy"},
        {"noise": "pq"},
        {"noise": "int4"},
        {"noise": ["pq", "int8"], "activation_bits": 8, "activation_calibration": 2},
    ],
    ids=lambda settings: str(settings["noise"]),
)
def test_compiled_noise_uses_current_rates_and_codebooks(settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).train()
    apply_quant_noise(model, QuantNoiseConfig(p=0.3, block_size=4, n_centroids=16, **settings))
    state, weight = find_state(model), model[0].weight
    compiled = torch.compile(model, backend="aot_eager")
    noises = len(state.p)
    for rate in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        state.p = rate
        share = (effective_weight(compiled) != weight).float().mean().item()
        if "activation_bits" not in settings:  # rounding changes the unit vectors
            assert share == pytest.approx(1 - (1 - rate) ** noises, abs=0.07)
        assert not torch.equal(effective_weight(compiled), effective_weight(compiled))
    # One graph for the first rate, one for the others; a few more while ranges are observed.
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["recompile_limit"] and not counters["graph_break"]
    with torch.no_grad():
        weight *= 1.7
    state.p = 1.0
    state.refresh_codebooks()
    state.refresh_scales()
    torch.testing.assert_close(effective_weight(compiled), effective_weight(model))
    state.p = 0.0
    clean = nn.Sequential(nn.Linear(64, 64, bias=False))
    clean[0].weight = weight
    if "activation_bits" not in settings:
        assert torch.equal(effective_weight(compiled), effective_weight(clean))


@pytest.mark.parametrize("noise", ["proxy", "pq", "int8"])
def test_compiled_lookup_takes_batches_of_any_length(noise):
    table = nn.Sequential(nn.Embedding(200, 16)).train()
    config = QuantNoiseConfig(noise, p=0.5, block_size=4, n_centroids=16, target_modules=".*")
    apply_quant_noise(table, config)
    compiled = torch.compile(table, backend="aot_eager")
    for length in (5, 7, 9, 11):
        ids = torch.arange(length)
        assert not torch.equal(compiled(ids), table[0].weight[:length])
    assert counters["stats"]["unique_graphs"] <= 2


def test_compiled_layerdrop_skips_different_layers(input_ids):
    model = make_stacked("gpt2", 2)
    noise = QuantNoiseConfig(noise="proxy", p=0.3, layerdrop=0.5, target_modules=["wte", "lm_head"])
    apply_quant_noise(model, noise).train()
    compiled = torch.compile(model, backend="eager")
    losses = [float(compiled(input_ids, labels=input_ids).loss.detach()) for _ in range(12)]
    assert len(set(losses)) > 6
    find_state(model).p = 0.0
    losses = {float(compiled(input_ids, labels=input_ids).loss.detach()) for _ in range(16)}
    assert 1 < len(losses) <= 4  # of two layers none, one, the other, or both are skipped


class CountGraphs(TrainerCallback):
    """Counts the graphs that each training compiles."""

    def __init__(self):
        self.graphs = []

    def on_train_begin(self, args, state, control, **kwargs):
        counters.clear()

    def on_train_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_compiled_training_equals_eager_mode(bits, tmp_path, parity_data, monkeypatch):
    results = {}
    for name, more in (("eager", {}), ("compiled", COMPILED)):
        count = CountGraphs()
        real = stages.StageTrainer.__init__

        def init(self, *args, real=real, count=count, **kwargs):
            real(self, *args, **kwargs)
            self.add_callback(count)

        monkeypatch.setattr(stages.StageTrainer, "__init__", init)
        trainer = make_trainer(
            tmp_path / name, make_stacked("bert", 1), parity_data,
            QuantNoiseConfig(noise="int8", p=1.0), parts={"eval_dataset": parity_data},
            max_steps=4, **more,
        )  # fmt: skip
        trainer.add_callback(count)
        trainer.evaluate()  # compiles the model in eval mode only
        trainer.train()
        config = IPQConfig(block_size=4, n_centroids=16, codebook_bits=bits,
                           stages=["ffn", "attention"])  # fmt: skip
        small = trainer.compress(config, CompressionArguments(stage_steps=2))
        monkeypatch.setattr(stages.StageTrainer, "__init__", real)
        assert type(small).__name__ == "BertForSequenceClassification"
        losses = [record["metric"]["eval_loss"] for record in trainer.compression_history]
        results[name] = tensors_of(small), losses, count.graphs
    eager, compiled = results["eager"], results["compiled"]
    assert eager[2] == [0, 0, 0]
    assert all(compiled[2]), "a stage was trained without torch_compile"
    for name, parameter in compiled[0].items():
        torch.testing.assert_close(parameter, eager[0][name], rtol=1e-3, atol=1e-5)
    assert compiled[1] == pytest.approx(eager[1], rel=1e-4)


INDUCTOR = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))),
        reason="inductor needs a C++ compiler",
    ),
]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.parametrize(
    "fields", [{"codebook_bits": 16}, {"codebook_bits": 8}, {"row_scale": True}], ids=str
)
def test_compiled_noise_rounds_trained_centroids(fields, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).train()
    config = QuantNoiseConfig(
        noise="pq", p=1.0, block_size=4, n_centroids=16, learn_codebooks=True, **fields
    )
    apply_quant_noise(model, config)
    ((_, noise),) = find_state(model).weights[0].noise.functions
    with torch.no_grad():
        for parameter in find_state(model).parameters():  # as after a step of an optimizer
            parameter.mul_(1 + 1e-3 * torch.rand_like(parameter))
        exact = replace(noise.quantizer, codebook_bits=32).decode(noise.state["codes"], noise.state)
    compiled = torch.compile(model, backend=backend)
    assert not torch.equal(effective_weight(model), exact)
    assert torch.equal(effective_weight(compiled), effective_weight(model))
