"""A run that is killed at any moment ends with the model of an undisturbed run.

A kill leaves the files as they are at that moment. The undisturbed run therefore copies its folder
at every such moment, and a run is resumed from each copy.
"""

import os
import shutil

import pytest
import torch
from support.stacked import make_stacked
from support.tiny import with_dropout
from support.trainers import (
    assert_same,
    assert_same_result,
    make_trainer,
    tensors,
    with_other_weights,
)
from transformers import Trainer, TrainerState

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseCallback, QuantNoiseConfig
from hf_quantnoise.compression.checkpoints import StageCheckpoints
from hf_quantnoise.compression.trainer_checkpoints import checkpoint_defect
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

ONE_STAGE = IPQConfig(block_size=4, n_centroids=16, stages=["ffn"])
TWO_STAGES = IPQConfig(block_size=4, n_centroids=16, stages=["ffn", "attention"])
PQ = QuantNoiseConfig(noise="pq", p=0.2, n_centroids=16)
SCHEDULES = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "polynomial": {"lr_end": 1e-4},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": 10},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
# The data has 6 batches, so 7 steps and 1.5 epochs end inside an epoch.
LENGTHS = {
    "6 steps": {"max_steps": 6},
    "7 steps": {"max_steps": 7},
    "1 epoch": {"num_train_epochs": 1},
    "1.5 epochs": {"num_train_epochs": 1.5},
}
# Schedule, length, accumulation steps, save_strategy.
CASES = [
    *((schedule, "7 steps", 1, "steps") for schedule in SCHEDULES),
    *(("constant", length, 1, "steps") for length in LENGTHS if length != "7 steps"),
    *(("constant", length, 4, "epoch") for length in LENGTHS),
    ("linear", "1.5 epochs", 2, "steps"),
]


@pytest.fixture
def snapshots(monkeypatch, tmp_path):
    """Return a function that copies a run's folder before and after each call of some functions.

    It returns the list of copies, all of them different, which grows while the run proceeds.
    """

    def arrange(folder, *functions):
        copies, seen = [], set()

        def copy():
            paths = sorted(folder.rglob("*"))
            files = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
            if files not in seen:
                seen.add(files)
                copies.append(tmp_path / f"copy-{len(copies)}")
                shutil.copytree(folder, copies[-1], dirs_exist_ok=True)

        def watch(function):
            def watched(*args, **kwargs):
                copy()
                try:
                    return function(*args, **kwargs)
                finally:
                    copy()

            return watched

        for owner, name in functions:
            monkeypatch.setattr(owner, name, watch(getattr(owner, name)))
        return copies

    return arrange


def make_bert_trainer(folder, data, noise=None, **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    return make_trainer(folder, make_stacked("bert", 1), data, noise, **{**settings, **changes})


def arguments_of(schedule, accumulation, strategy):
    return {
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": SCHEDULES[schedule],
        "gradient_accumulation_steps": accumulation,
        "save_strategy": strategy,
    }


@pytest.mark.parametrize(("schedule", "length", "accumulation", "strategy"), CASES)
def test_a_finished_stage_that_was_not_saved_is_not_trained_further(
    schedule, length, accumulation, strategy, tmp_path, parity_data, snapshots, monkeypatch
):
    names = {"max_steps": "stage_steps", "num_train_epochs": "stage_epochs"}
    lengths = {names[name]: value for name, value in LENGTHS[length].items()}
    settings = CompressionArguments(**lengths, distill=False, plots=False)
    changes = arguments_of(schedule, accumulation, strategy)
    copies = snapshots(tmp_path / "run", (StageCheckpoints, "save_stage"))
    straight = make_bert_trainer(tmp_path / "run", parity_data, **changes)
    straight.compress(ONE_STAGE, settings)
    finished = copies[2]  # after those without files and with the dense model
    resumed = make_bert_trainer(finished, parity_data, **changes)
    monkeypatch.setattr(StageTrainer, "training_step", None)  # training would fail
    resumed.compress(ONE_STAGE, settings, resume_from_checkpoint=True)
    assert_same_result(resumed, straight)


@pytest.mark.parametrize(
    ("schedule", "length", "accumulation", "strategy"), [case for case in CASES if case[2] > 1]
)
def test_training_resumed_from_its_last_checkpoint_takes_no_step(
    schedule, length, accumulation, strategy, tmp_path, parity_data
):
    changes = arguments_of(schedule, accumulation, strategy) | LENGTHS[length]
    straight = make_bert_trainer(tmp_path, parity_data, PQ, **changes)
    straight.train()
    resumed = make_bert_trainer(tmp_path, parity_data, PQ, **changes)
    resumed.training_step = None  # training would fail
    resumed.train(resume_from_checkpoint=True)
    assert_same(tensors(resumed.model), tensors(straight.model))
    assert resumed.state.global_step == straight.state.global_step


@pytest.mark.parametrize("step", [5, 6, 8])
def test_streamed_data_resume_at_the_same_batch(step, tmp_path, parity_data, snapshots):
    """An epoch has 4 batches, which Trainer does not know."""
    stream = parity_data.select(range(64)).to_iterable_dataset()
    changes = {"max_steps": 9, "save_steps": step}
    copies = snapshots(tmp_path / "run", (QuantNoiseCallback, "on_save"))
    straight = make_bert_trainer(tmp_path / "run", stream, PQ, **changes)
    straight.train()
    resumed = make_bert_trainer(copies[1], stream, PQ, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.epoch == straight.state.epoch > 2
    assert_same(tensors(resumed.model), tensors(straight.model))


# Functions that write or remove files.
WRITERS = (
    (os, "replace"), (torch, "save"), (shutil, "rmtree"), (Trainer, "save_model"),
    (TrainerState, "save_to_json"), (StageCheckpoints, "save_stage"),
)  # fmt: skip
MOMENTS = {
    "steps": {"save_strategy": "steps", "save_steps": 2, "max_steps": 7},
    "epochs": {"save_strategy": "epoch", "num_train_epochs": 2, "gradient_accumulation_steps": 4},
    "best": {"save_strategy": "best", "eval_strategy": "epoch", "num_train_epochs": 2,
             "metric_for_best_model": "loss"},
}  # fmt: skip


def make_dropout_trainer(folder, data, **changes):
    parts = {"eval_dataset": data.select(range(16))}
    model = with_dropout(make_stacked("bert", 1))
    return make_trainer(folder, model, data, PQ, parts=parts, **changes)


@pytest.mark.parametrize(
    "moments", ["epochs", *(pytest.param(m, marks=pytest.mark.slow) for m in ("steps", "best"))]
)
def test_training_killed_at_any_moment(moments, tmp_path, parity_data, snapshots):
    copies = snapshots(tmp_path / "run", *WRITERS)
    straight = make_dropout_trainer(tmp_path / "run", parity_data, **MOMENTS[moments])
    straight.train()
    resumed = 0
    for copy in list(copies):
        trainer = make_dropout_trainer(copy, parity_data, **MOMENTS[moments])
        if not any(checkpoint_defect(path) is None for path in copy.glob("checkpoint-*")):
            with pytest.raises(ValueError, match="checkpoint"):
                trainer.train(resume_from_checkpoint=True)
            continue
        trainer.train(resume_from_checkpoint=True)
        resumed += 1
        assert_same(tensors(trainer.model), tensors(straight.model))
    assert resumed > len(copies) / 2
    print(f"training killed at {len(copies)} moments, resumed from {resumed}")


@pytest.mark.slow
@pytest.mark.parametrize("moments", MOMENTS)
def test_compression_killed_at_any_moment(moments, tmp_path, parity_data, snapshots):
    copies = snapshots(tmp_path / "run", *WRITERS)
    changes = MOMENTS[moments]
    lengths = {"stage_steps": changes.get("max_steps"), "stage_epochs": 2}
    settings = CompressionArguments(**lengths, plots=False, keep_noise=True)

    def compress(folder, resume):
        trainer = make_dropout_trainer(folder, parity_data, **changes)
        if resume:
            with_other_weights(trainer.model)
        trainer.compress(TWO_STAGES, settings, resume_from_checkpoint=resume)
        return trainer

    straight = compress(tmp_path / "run", False)
    resumed = 0
    for copy in list(copies):
        # Until the dense model is saved, the run starts from scratch.
        has_dense = (copy / "compression" / "stage-0").exists()
        assert_same_result(compress(copy, has_dense), straight)
        resumed += has_dense
    print(f"compression killed at {len(copies)} moments, resumed from {resumed}")
