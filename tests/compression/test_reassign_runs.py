"""Blocks that change codewords in a training: what is checked on which batch, what it leaves."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from support.packed_linears import QUANTIZERS, Regression, normal
from support.stage_runs import (
    CONV,
    ONE_STAGE,
    Killed,
    Rows,
    Watch,
    assert_same,
    make_pass_trainer,
    make_trainer,
    settings,
    tensors,
)
from support.tasks import TASKS
from support.tiny import make_model, with_dropout
from torch import nn

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
)
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import packed_layers


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
    "accumulation": (
        "classification", ONE_STAGE, None, {},
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
