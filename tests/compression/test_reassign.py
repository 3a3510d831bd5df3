"""When blocks may change codewords: the rule, what does not fit, and the same on all ranks."""

import copy
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.packed_linears import QUANTIZERS, Regression, normal
from support.processes import needs_gloo
from support.stage_runs import ONE_STAGE, settings
from support.tiny import make_model, with_dropout
from torch import nn

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseTrainer,
    quantize_model,
)
from hf_quantnoise.compression.exchanges import promising
from hf_quantnoise.compression.reassign import ReassignCallback, require_centroids
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import pack_layer, packed_layers
from hf_quantnoise.quantizers import ProductQuantizer


def gathered(callback, model, batches, done=0, ends=99):
    """Lets a callback see one step for each batch; what it has proposed at the end."""
    for step, batch in enumerate(batches, done):
        state = SimpleNamespace(global_step=step, max_steps=ends)
        callback.on_step_begin(None, state, None, model=model)
        model(**batch)["loss"].backward()
        state.global_step += 1
        callback.on_step_end(None, state, None)
    return callback._proposal


# ---- the rule ------------------------------------------------------------------------------------


def test_a_window_sums_micro_batches_steps_and_ties_up(input_ids, monkeypatch):
    """It is the gradient of the dense weight, over all backwards and both layers that hold it."""
    model = quantize_model(make_model("gpt2"), IPQConfig(n_centroids=16), progress=False)
    model = with_dropout(model.train(), 0.0)
    dense, seen = copy.deepcopy(model).dequantize(), []
    monkeypatch.setattr(
        "hf_quantnoise.compression.reassign.promising",
        lambda weights, share: seen.append(weights) or promising(weights, share),
    )
    callback = ReassignCallback(2, 0.01)
    for step, ids in enumerate(input_ids.split(1)[:2]):
        state = SimpleNamespace(global_step=step, max_steps=9)
        callback.on_step_begin(None, state, None, model=model)
        for micro_batch in ids.split(6, 1):
            for each in (model, dense):
                each(micro_batch, labels=micro_batch).loss.backward()
        callback.on_step_end(None, state, None)
    assert callback.waits and len(seen) == 1
    (total,) = (total for layers, total in seen[0] if model.lm_head in layers)
    (layers,) = (layers for layers, _ in seen[0] if model.lm_head in layers)
    assert len(layers) == 2
    torch.testing.assert_close(total, dense.lm_head.weight.grad, rtol=1e-3, atol=1e-6)
    assert all(layer._on_gradient is None for _, layer in packed_layers(model))


@pytest.mark.parametrize(
    ("losses", "moved"),
    [
        ([1.0, 0.9], 40),
        ([1.0, 1.0, 1.1, 0.9], 2),
        ([1.0, 2.0, 0.99], 10),
        ([1.0, float("nan"), 2.0, 2.0, 1.0], 0),
        ([float("nan"), 1.0, 1.0, 1.0, 1.0], 0),
    ],
)
def test_the_first_part_that_lowers_the_loss_stays(losses, moved):
    model, batch = Regression(ProductQuantizer(4, 32)), {"x": normal(9, 64), "labels": 0}
    callback, before = ReassignCallback(1, 40 / 1024), copy.deepcopy(model)
    proposal = gathered(callback, model, [batch])
    script, found = iter(losses), []

    def loss():
        found.append((model.layer.codes() != before.layer.codes()).any(1).sum().item())
        return torch.tensor(next(script))

    callback.check(1, loss)
    assert next(script, None) is None and not callback.waits
    assert found == [0, 40, 10, 2, 1][: len(losses)]
    proposal.weights = [[before.layer]]
    proposal.put(proposal.codes[:moved])
    assert torch.equal(model.layer.weight_indices, before.layer.weight_indices)
    assert callback.checks == {1: (40, moved)}
    assert callback.figures() == {"reassign_proposed": 40 / 1024, "reassigned": moved / 1024}
    assert callback.figures() == {"reassign_proposed": 0.0, "reassigned": 0.0}


def test_few_exchanges_are_tried_once_each():
    model, batch = Regression(ProductQuantizer(4, 32)), {"x": normal(9, 64), "labels": 0}
    callback, calls = ReassignCallback(1, 3 / 1024), []
    gathered(callback, model, [batch])
    callback.check(1, lambda: calls.append(None) or torch.tensor(1.0))
    assert len(calls) == 1 + 2  # three and one of them, and as it was


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_does_harm_on_other_data_is_undone_and_what_helps_stays(name):
    model = Regression(QUANTIZERS[name])
    x = normal(64, 64, seed=2)
    with torch.no_grad():
        outputs = model.layer(x)
    wanted = x @ normal(64, 64).t()
    like, unlike = ({"x": x, "labels": labels} for labels in (wanted, 2 * outputs - wanted))
    bits = model.layer.weight_indices.clone()

    def check(other):
        """How much lower the error is after it, and how many blocks moved."""
        callback = ReassignCallback(1, 0.02)
        gathered(callback, model, [like])
        with torch.no_grad():
            before = model(**other)["loss"]
            callback.check(1, lambda: model(**other)["loss"])
            return float(before - model(**other)["loss"]), callback.checks[1][1]

    # The one error can but grow with whatever lowers the other one.
    assert check(unlike) == (0.0, 0)
    assert torch.equal(model.layer.weight_indices, bits)
    fall, moved = check(like)
    assert fall > 0 and moved > 0
    assert not torch.equal(model.layer.weight_indices, bits)


def test_the_last_steps_are_left_to_the_centroids():
    model, batch = Regression(ProductQuantizer(4, 32)), {"x": normal(9, 64), "labels": 0}
    callback, due = ReassignCallback(3, 0.05), []
    for step in range(10):
        if gathered(callback, model, [batch], done=step, ends=10) is not None:
            due.append(step + 1)
            callback.check(step + 1, lambda: torch.tensor(1.0))
    assert due == [3, 6]
    assert not callback._window  # no more is gathered, and nothing is held


@pytest.mark.parametrize("event", ["on_save", "on_epoch_begin", "on_train_end"])
def test_an_event_forgets_the_window_and_the_proposal(event):
    model, batch = Regression(ProductQuantizer(4, 32)), {"x": normal(9, 64), "labels": 0}
    callback = ReassignCallback(2, 0.05)
    for steps in (1, 2, 3):  # inside a window, at its end, and inside the next
        gathered(callback, model, [batch] * steps)
        getattr(callback, event)(None, None, None)
        assert not (callback.waits or callback._window or callback._gathered)
        assert model.layer._on_gradient is None


# ---- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "changes", "words"),
    [
        (6, {}, "do not fit into the 6 steps of an epoch; one of at most 5 does"),
        (5, {"max_steps": 8}, "into the stage's 8 steps, of which as many at the end .* most 4"),
        (
            3,
            {"save_strategy": "steps", "save_steps": 3},
            r"into the 3 steps between checkpoints \(save_steps\); one of at most 2",
        ),
        (5, {"num_train_epochs": 3}, None),
    ],
)
def test_windows_in_which_nothing_can_move_are_told_of(
    steps, changes, words, tmp_path, parity_data, caplog
):
    trainer = StageTrainer(
        quantize_model(make_model("bert"), ONE_STAGE, progress=False),
        settings(tmp_path, **{"per_device_train_batch_size": 16, "num_train_epochs": 2, **changes}),
        compression_args=CompressionArguments(reassign_steps=steps, distill=False),
        train_dataset=parity_data,
    )
    with caplog.at_level("WARNING"):
        trainer.train()
    assert bool(trainer._reassign.checks) == (words is None)
    if words is None:
        assert "reassign_steps" not in caplog.text
    else:
        (message,) = {m for m in caplog.messages if "reassign_steps" in m}
        assert message.startswith(f"reassign_steps={steps}: no block will change its codeword")
        assert re.search(words, message)


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


def test_compilation_by_accelerate_alone_is_refused_too(tmp_path, parity_data, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")  # accelerate launch sets it
    trainer = QuantNoiseTrainer(make_model("bert"), settings(tmp_path), train_dataset=parity_data)
    with pytest.raises(ValueError, match="reassign_steps=5 does not go with torch_compile"):
        trainer.compress(IPQConfig(n_centroids=16), CompressionArguments(reassign_steps=5))
    assert not any(packed_layers(trainer.model))


# ---- two ranks -----------------------------------------------------------------------------------

RANK = """
import sys
from types import SimpleNamespace

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
state = SimpleNamespace(global_step=0, max_steps=9)
callback.on_step_begin(None, state, None, model=nn.ModuleList([layer]))
layer(torch.randn(5, 64)).square().sum().backward()
own = callback._window[0][1].clone()
callback.on_step_end(None, state, None)
# Old codes, all, a quarter: the sums are 4, 4.5 and 3.75, though each rank would choose otherwise.
losses = iter([[1.0, 0.5, 1.5], [3.0, 4.0, 2.25]][rank])
callback.check(1, lambda: torch.tensor(next(losses)))
torch.save([own, layer.codes(), before, callback.checks[1]], f"{folder}/codes-{rank}")
dist.destroy_process_group()
"""


@needs_gloo
def test_two_ranks_decide_alike(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    one, other = (torch.load(tmp_path / f"codes-{rank}") for rank in (0, 1))
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1]) and not torch.equal(one[1], one[2])
    assert one[3] == other[3] == (52, 13)
    # They are those that one process moves by the sum of both gradients.
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    pack_layer(layer, ProductQuantizer(4, 32))
    found = promising([([layer], one[0] + other[0])], 0.05)
    found.put(found.codes[:13])
    assert torch.equal(layer.codes(), one[1])
