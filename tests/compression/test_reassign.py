"""Blocks change codewords: by the rule, within the share, the same on all ranks, for the better."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tiny import make_model
from torch import nn
from transformers import TrainingArguments

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseTrainer,
    quantize_model,
)
from hf_quantnoise.compression.reassign import ReassignCallback, reassign, require_centroids
from hf_quantnoise.compression.stage_trainer import StageTrainer
from hf_quantnoise.modeling import pack_layer, packed_layers
from hf_quantnoise.quantizers import AdditiveQuantizer, ProductQuantizer

QUANTIZERS = {
    "pq": ProductQuantizer(4, 32),
    "pq-5bit-int8": ProductQuantizer(4, 20, codebook_bits=8),
    "pq-half": ProductQuantizer(8, 16, codebook_bits=16),
    "row-scale": ProductQuantizer(4, 32, row_scale=True),
    "additive": AdditiveQuantizer(8, 16),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_linear(quantizer, rows=64, columns=64):
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = normal(rows, columns)
    pack_layer(layer, quantizer)
    return layer


def best_exchanges(layer, gradient):
    """By brute force in float64: for each row the best (ratio, place of the code, new code)."""
    quantizer = layer.quantizer
    state = {key: value.detach().double() for key, value in layer.state.items()}
    size, m, k = quantizer.block_size, quantizer.codes_per_block, quantizer.n_centroids
    found = []
    for row, old in enumerate(layer.codes().long()):
        best = (-torch.inf, 0, 0)
        own = quantizer.state_of_rows(state, torch.tensor([row]))
        here = quantizer.decode(old[None], own)[0]
        for place in range(len(old)):
            at = slice(place // m * size, (place // m + 1) * size)
            new = old.repeat(k, 1)
            new[:, place] = torch.arange(k)
            every = {key: v.expand(k, 1) if key == "row_scale" else v for key, v in own.items()}
            step = quantizer.decode(new, every)[:, at] - here[at]
            lengths = step.square().sum(1)
            ratios = -(step @ gradient[row, at].double()) / lengths
            ratios[lengths == 0] = -torch.inf
            best = max(best, (float(ratios.max()), place, int(ratios.argmax())))
        found.append(best)
    return found


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_exchange_of_each_row_is_the_best_there_is(name):
    layer, gradient = packed_linear(QUANTIZERS[name], rows=6, columns=256), normal(6, 256, seed=3)
    before, expected = layer.codes().clone(), best_exchanges(layer, gradient)
    counts = layer.block_counts().clone()
    assert reassign([([layer], gradient)], 1.0) == 6  # one of a row at most
    for row, (_, place, code) in enumerate(expected):
        changed = layer.codes()[row] != before[row]
        assert changed.nonzero()[:, 0].tolist() == [place]
        assert int(layer.codes()[row, place]) == code
    assert not torch.equal(counts, layer.block_counts())  # what gradients are averaged by


@pytest.mark.parametrize("share", [1e-6, 0.002, 0.008])
def test_the_best_of_all_weights_move_within_the_share(share):
    """The weights of a model compete: one whose gradients are small moves nothing."""
    layers = [packed_linear(QUANTIZERS[name]) for name in ("pq", "additive", "pq")]
    gradients = [normal(64, 64, seed=3), normal(64, 64, seed=4), 1e-3 * normal(64, 64, seed=5)]
    before = [layer.weight.detach().clone() for layer in layers]
    ratios = torch.tensor(
        [
            [best[0] for best in best_exchanges(*pair)]
            for pair in zip(layers, gradients, strict=True)
        ]
    )
    count = math.ceil(share * (1024 + 512 + 1024))
    pairs = [([layer], gradient) for layer, gradient in zip(layers, gradients, strict=True)]
    assert reassign(pairs, share) == count
    steps = [layer.weight.detach() - old for layer, old in zip(layers, before, strict=True)]
    moved = torch.stack([step.abs().sum(1) > 0 for step in steps])
    assert moved.sum() == count and not moved[2].any()
    assert ratios[moved].min() > ratios[~moved].max()
    for step, gradient, rows in zip(steps, gradients, moved, strict=True):
        assert ((step * gradient).sum(1)[rows] < 0).all()  # the linearised loss falls


def test_gradients_that_say_nothing_move_nothing():
    layer = packed_linear(ProductQuantizer(4, 32))
    codes = layer.codes().clone()
    for gradient in (torch.zeros(64, 64), torch.full((64, 64), torch.nan)):
        assert reassign([([layer], gradient)], 1.0) == 0
    assert torch.equal(layer.codes(), codes)


def test_equal_centroids_are_no_exchange():
    layer = packed_linear(ProductQuantizer(4, 32))
    with torch.no_grad():
        layer.weight_codebook[:] = layer.weight_codebook[0]
    assert reassign([([layer], normal(64, 64, seed=3))], 1.0) == 0


class Regression(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.layer = packed_linear(quantizer)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


@pytest.mark.parametrize("name", ["pq", "row-scale", "additive"])
def test_a_regression_ends_lower_than_without(name, tmp_path):
    """Centroids finetuned by Adam on unequal inputs, on batches of 32 drawn alike."""
    mixing, dense = normal(64, 64, seed=1) / 8, normal(64, 64)
    x = normal(2048, 64, seed=2) @ mixing.t()
    data = [{"x": row, "labels": row @ dense.t()} for row in x]
    losses = []
    for steps in (None, 10):
        arguments = CompressionArguments(reassign_steps=steps, reassign_share=0.005, distill=False)
        trainer = StageTrainer(
            Regression(QUANTIZERS[name]), settings(tmp_path, max_steps=200, learning_rate=3e-3),
            compression_args=arguments, train_dataset=data,
        )  # fmt: skip
        trainer.train()
        with torch.no_grad():
            held_out = normal(2000, 64, seed=9) @ mixing.t()
            losses.append(float(trainer.model(held_out, held_out @ dense.t())["loss"]))
    assert losses[1] < 0.97 * losses[0]


def settings(folder, **changes):
    return TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
        **{"per_device_train_batch_size": 32, "logging_strategy": "no", **changes},
    )  # fmt: skip


def test_micro_batches_and_ties_add_up(input_ids):
    """What is gathered is the gradient of the dense weight, over two backwards and both users."""
    model = quantize_model(make_model("gpt2"), IPQConfig(n_centroids=16), progress=False).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    dense = copy.deepcopy(model).dequantize()
    callback, state = ReassignCallback(1, 0.01), type("S", (), {"global_step": 0, "max_steps": 9})
    callback.on_step_begin(None, state, None, model=model)
    for ids in input_ids.split(2):
        for each in (model, dense):
            each(ids, labels=ids).loss.backward()
    key = id(model.lm_head.weight_indices)
    layers, total = callback._weights[key]
    assert len(layers) == 2
    torch.testing.assert_close(total, dense.lm_head.weight.grad, rtol=1e-3, atol=1e-6)
    codes = model.lm_head.codes().clone()
    state.global_step = 1
    callback.on_step_end(None, state, None)
    assert callback.moved[1] > 0 and not torch.equal(codes, model.lm_head.codes())
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert all(layer._on_gradient is None for _, layer in packed_layers(model))


def compress(folder, data, steps, **changes):
    trainer = QuantNoiseTrainer(make_model("bert"), settings(folder, **changes), train_dataset=data)
    arguments = CompressionArguments(stage_epochs=2, reassign_steps=steps, reassign_share=0.05)
    return trainer.compress(IPQConfig(n_centroids=16, stages=["ffn"]), arguments)


def test_the_staged_pass_reassigns_and_a_seed_reproduces_it(tmp_path, parity_data, input_ids):
    without, first, again = (compress(tmp_path, parity_data, steps) for steps in (None, 2, 2))
    name, layer = next(iter(packed_layers(first)))
    assert not torch.equal(layer.codes(), without.get_submodule(name).codes())
    with torch.no_grad():
        expected = first(input_ids).logits
        assert torch.equal(again(input_ids).logits, expected)
        first.save_pretrained(tmp_path / "saved")
        loaded = type(first).from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded(input_ids).logits, expected)


def test_the_last_steps_are_left_to_the_centroids():
    callback = ReassignCallback(3, 0.05)
    layer = packed_linear(ProductQuantizer(4, 32))
    due = []
    for step in range(10):
        state = type("S", (), {"global_step": step, "max_steps": 10})
        callback.on_step_begin(None, state, None, model=nn.ModuleList([layer]))
        if callback._weights:
            due.append(step + 1)
            callback._weights = {}
    assert due == [3, 6]


def test_what_does_not_fit_is_refused(tmp_path, parity_data):
    for bad, words in (
        ({"reassign_steps": 0}, "reassign_steps=0 must be an integer from 1"),
        ({"reassign_share": 0.0}, "reassign_share=0.0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            CompressionArguments(**bad)
    trainer = QuantNoiseTrainer(make_model("bert"), settings(tmp_path), train_dataset=parity_data)
    with pytest.raises(ValueError, match="reassign_steps=5 needs codewords, and a FixedPointConf"):
        trainer.compress(FixedPointConfig(), CompressionArguments(reassign_steps=5))
    assert not any(packed_layers(trainer.model))
    for name in ("fsdp", "deepspeed", "torch_compile"):
        args = type("A", (), {name: True})
        with pytest.raises(ValueError, match=f"does not go with {name}"):
            ReassignCallback(5, 0.01).on_train_begin(args, None, None)
        with pytest.raises(ValueError, match=f"does not go with {name}"):
            require_centroids(IPQConfig(), CompressionArguments(reassign_steps=5), args)


RANK = """
import sys
import torch
import torch.distributed as dist
from torch import nn

from hf_quantnoise.compression.reassign import ReassignCallback
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.quantizers import ProductQuantizer

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
layer = nn.Linear(64, 64)
pack_layer(layer, ProductQuantizer(4, 32))
before = layer.codes().clone()
torch.manual_seed(rank)  # other data on each rank
callback = ReassignCallback(1, 0.05)
state = type("S", (), {"global_step": 0, "max_steps": 9})
callback.on_step_begin(None, state, None, model=nn.ModuleList([layer]))
layer(torch.randn(5, 64)).square().sum().backward()
own = next(iter(callback._weights.values()))[1].clone()
callback.on_step_end(None, state, None)
torch.save([own, layer.codes(), before], f"{folder}/codes-{rank}")
dist.destroy_process_group()
"""


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
def test_two_ranks_move_the_same_blocks(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    one, other = (torch.load(tmp_path / f"codes-{rank}") for rank in (0, 1))
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1]) and not torch.equal(one[1], one[2])
    # They are those that one process moves by the sum of both gradients.
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    pack_layer(layer, ProductQuantizer(4, 32))
    reassign([([layer], one[0] + other[0])], 0.05)
    assert torch.equal(layer.codes(), one[1])
