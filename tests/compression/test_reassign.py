"""Blocks change codewords where a fresh batch says so: measured, undone, alike on all ranks."""

import copy
import itertools
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from packed_linears import QUANTIZERS, normal, packed_linear
from stage_runs import (
    CONV,
    ONE_STAGE,
    Killed,
    Rows,
    Watch,
    assert_same,
    make_pass_trainer,
    make_trainer,
    tensors,
)
from tasks import TASKS
from tiny import make_model
from torch import nn
from transformers import TrainingArguments

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    quantize_model,
)
from hf_quantnoise.compression.exchanges import promising
from hf_quantnoise.compression.reassign import ReassignCallback, require_centroids
from hf_quantnoise.compression.stage_trainer import StageTrainer
from hf_quantnoise.modeling import pack_layer, packed_layers
from hf_quantnoise.quantizers import ProductQuantizer


class Regression(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.layer = packed_linear(quantizer)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


def settings(folder, **changes):
    return TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True,
        **{"per_device_train_batch_size": 32, "logging_strategy": "no", "save_strategy": "no",
           **changes},
    )  # fmt: skip


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
    model = quantize_model(make_model("gpt2"), IPQConfig(n_centroids=16), progress=False).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
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


# ---- the trainer ---------------------------------------------------------------------------------


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


class Eyes:
    """Sees the batches that are trained on and those of the checks, which ``refuse`` lets fail.

    Attributes:
        trained: (optimizer steps done, batch) in order.
        checked: (number of the batch that is about to be trained on, batch) for each measurement.
    """

    def __init__(self, monkeypatch, refuse=True):
        self.trained, self.checked = [], []
        objective, training_step = StageTrainer._objective, StageTrainer.training_step

        def watched_step(trainer, model, inputs, *args):
            self.trained.append((trainer.state.global_step, copy.deepcopy(dict(inputs))))
            return training_step(trainer, model, inputs, *args)

        def watched(trainer, model, inputs, *args):
            found = objective(trainer, model, inputs, *args)
            if any(module.training for module in model.modules()):
                return found
            assert not torch.is_grad_enabled()
            self.checked.append((len(self.trained) - 1, inputs))
            return (torch.tensor(1.0), *found[1:]) if refuse else found

        monkeypatch.setattr(StageTrainer, "training_step", watched_step)
        monkeypatch.setattr(StageTrainer, "_objective", watched)


def with_dropout(model, rate=0.2):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
    return model


def restless(outputs, labels, num_items_in_batch=None):
    loss = nn.functional.cross_entropy(outputs["logits"], labels)
    return loss * (1 + random.random() + np.random.rand() + torch.rand(()))


# Name -> task, config, noise, arguments of the stages, of the trainer.
RUNS = {
    "dropout, noise and inner targets": (
        "classification", IPQConfig(block_size=4, n_centroids=8, stages=["ffn", "attention"]),
        QuantNoiseConfig(noise="proxy", p=0.3, block_size=4),
        {"keep_noise": True, "distill_hidden": 0.5, "distill_attention": 0.5,
         "distill_weight": 0.5}, {},
    ),
    "cache and accumulation": (
        "classification", ONE_STAGE, None, {"distill_cache": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    "labels and a tied head": (
        "masked LM", IPQConfig(block_size=4, n_centroids=8, row_scale=True, codebook_bits=16,
                               stages=["embeddings"]),
        None, {"distill": False}, {"label_smoothing_factor": 0.1},
    ),
    "a loss that draws random numbers": (
        "classification", ONE_STAGE, None, {"distill_weight": 0.5},
        {"parts": {"eval_dataset": None, "compute_loss_func": restless}},
    ),
    "statistics of BatchNorm": ("resnet", CONV, None, {"distill": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_run_in_which_no_exchange_pays_is_one_without_reassignment(case, tmp_path, monkeypatch):
    """Bit for bit: codes, statistics, dropout and noise drawn after a check, and what is logged."""
    task, config, noise, stages, changes = RUNS[case]
    make, batch = TASKS[task]
    eyes, watch, results = Eyes(monkeypatch), Watch(monkeypatch), []
    for steps in (None, 2):
        arguments = CompressionArguments(
            stage_epochs=2, reassign_steps=steps, reassign_share=0.05, **stages
        )
        trainer = make_pass_trainer(
            tmp_path, with_dropout(make()), Rows(batch()), noise,
            **{"parts": {"eval_dataset": None}, "per_device_train_batch_size": 4,
               "logging_steps": 1, **changes},
        )  # fmt: skip
        trainer.compress(config, arguments)
        assert bool(eyes.checked) == (steps is not None)
        results.append((tensors(trainer.model), torch.get_rng_state(), watch.logs.copy()))
        watch.logs.clear()
    (plain, plain_state, plain_logs), (checked, state, logs) = results
    assert_same(plain, checked)
    assert torch.equal(plain_state, state)
    own = {"reassigned", "reassign_proposed"}
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    for one, other in zip(plain_logs, logs, strict=True):
        assert not own & one.keys()
        assert {k: v for k, v in other.items() if k not in own | timed} == {
            k: v for k, v in one.items() if k not in timed
        }
    assert sum(log.get("reassign_proposed", 0) for log in logs) > 0
    assert sum(log.get("reassigned", 0) for log in logs) == 0


def test_a_check_is_made_once_on_the_first_batch_that_the_window_has_not_seen(
    tmp_path, parity_data, monkeypatch
):
    eyes = Eyes(monkeypatch)
    trainer = make_pass_trainer(
        tmp_path, make_model("bert"), parity_data, parts={"eval_dataset": None},
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    arguments = CompressionArguments(stage_epochs=2, reassign_steps=5, reassign_share=0.05)
    trainer.compress(ONE_STAGE, arguments)
    done = [(number, eyes.trained[number][0]) for number, _ in eyes.checked]
    # 12 steps of two micro-batches in an epoch; steps are counted anew in the second one.
    assert [step for step, _ in itertools.groupby(done)] == [(10, 5), (20, 10), (34, 17)]
    assert len(eyes.trained) == 48
    for number, batch in eyes.checked:
        assert torch.equal(batch["input_ids"], eyes.trained[number][1]["input_ids"])
        window = torch.cat([one["input_ids"] for _, one in eyes.trained[number - 10 : number]])
        for row in batch["input_ids"]:
            assert not (window == row).all(1).any()


def compress(folder, data, steps, **changes):
    trainer = QuantNoiseTrainer(make_model("bert"), settings(folder, **changes), train_dataset=data)
    arguments = CompressionArguments(stage_epochs=2, reassign_steps=steps, reassign_share=0.05)
    trainer.compress(IPQConfig(n_centroids=16, stages=["ffn"]), arguments)
    return trainer


def test_the_staged_pass_reassigns_and_a_seed_reproduces_it(tmp_path, parity_data, input_ids):
    changes = {"per_device_train_batch_size": 8, "logging_strategy": "steps", "logging_steps": 5}
    runs = [compress(tmp_path, parity_data, steps, **changes) for steps in (None, 2, 2)]
    without, first, again = (run.model for run in runs)
    name, layer = next(iter(packed_layers(first)))
    assert not torch.equal(layer.codes(), without.get_submodule(name).codes())
    with torch.no_grad():
        expected = first(input_ids).logits
        assert torch.equal(again(input_ids).logits, expected)
        first.save_pretrained(tmp_path / "saved")
        loaded = type(first).from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded(input_ids).logits, expected)
    # What happened is seen, with each loss and at the end.
    logs = [log for log in runs[1].state.log_history if "compression_reassigned" in log]
    assert len(logs) == 24 // 5 + 1 and "compression_train_loss" in logs[-1]
    assert 0 < sum(log["compression_reassigned"] for log in logs) < 1
    for log in logs:
        assert log["compression_reassigned"] <= log["compression_reassign_proposed"]
    assert not any("compression_reassigned" in log for log in runs[0].state.log_history)


def test_the_objective_of_the_check_is_the_one_that_is_trained(tmp_path, monkeypatch):
    """Without dropout both modes agree: labels, logits and hidden states, each with its weight."""
    make, batch = TASKS["classification"]
    eyes, losses = Eyes(monkeypatch, refuse=False), []
    objective = StageTrainer._objective

    def kept(trainer, model, inputs, *args):
        found = objective(trainer, model, inputs, *args)
        losses.append((model.training, found[0].item()))
        return found

    monkeypatch.setattr(StageTrainer, "_objective", kept)
    model = with_dropout(make(), 0.0)
    trainer = make_trainer(tmp_path, model=model, data=Rows(batch()), per_device_train_batch_size=2)
    arguments = CompressionArguments(
        reassign_steps=1, reassign_share=1e-6, distill_weight=0.4, distill_hidden=0.7,
        distill_attention=0.3,
    )  # fmt: skip
    trainer.compress(ONE_STAGE, arguments)
    assert eyes.checked
    for place, (training, loss) in enumerate(losses):
        if training and place and not losses[place - 1][0]:
            before, after = losses[place - 2][1], losses[place - 1][1]
            # One exchange is proposed: it stays where it lowers the loss.
            assert loss == pytest.approx(after if after < before else before, rel=1e-5)


def test_nothing_listens_after_a_run_that_was_broken_off(tmp_path, parity_data, kill):
    kill(StageTrainer, "training_step", 2)
    trainer = make_pass_trainer(tmp_path, make_model("bert"), parity_data, parts={})
    with pytest.raises(Killed):
        trainer.compress(ONE_STAGE, CompressionArguments(reassign_steps=2))
    layers = [layer for _, layer in packed_layers(trainer.model)]
    assert layers and all(layer._on_gradient is None for layer in layers)


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


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
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
