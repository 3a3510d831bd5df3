"""The noise phase goes on from the newest checkpoint that is whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import needs_gloo, on_two_ranks
from support.stage_runs import Killed, assert_same
from support.tiny import make_model
from transformers import TrainingArguments

from hf_quantnoise import QuantNoiseConfig, QuantNoiseTrainer
from hf_quantnoise.compression.trainer_checkpoints import (
    checkpoint_defect,
    newest_complete_checkpoint,
)

PQ = QuantNoiseConfig(noise="pq", p=0.2, n_centroids=16, codebook_update=2)


def make_trainer(folder, data, noise=PQ, model=None, **changes):
    settings = {
        "per_device_train_batch_size": 16, "learning_rate": 1e-3, "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "save_steps": 2, "num_train_epochs": 1, **changes,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **settings)
    return QuantNoiseTrainer(model or make_model("bert"), args, noise, train_dataset=data)


def tensors(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, parity_data):
    """A run of 6 steps with a checkpoint every 2, and what it ended with."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = make_trainer(folder, parity_data)
    trainer.train()
    return folder, tensors(trainer)


@pytest.fixture
def run(straight, tmp_path):
    """A copy of that run's folder, as if it had been killed in its checkpoint after 4 steps."""
    folder = tmp_path / "a run"
    shutil.copytree(straight[0], folder)
    shutil.rmtree(folder / "checkpoint-6")
    return folder


READ = [
    "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "quant_noise_config.json", "quant_noise_state.safetensors",
]  # fmt: skip


def test_these_are_the_files(run):
    there = {path.name for path in (run / "checkpoint-4").iterdir()}
    assert there == {*READ, "training_args.bin"}


def resume_and_compare(run, straight, data, caplog):
    """Goes on from the first checkpoint, ends as the undisturbed run did, and says so."""
    trainer = make_trainer(run, data)
    steps = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: steps.append(0) or step(*args, **kwargs)
    trainer.train(resume_from_checkpoint=True)
    assert len(steps) == 4  # from 2 to 6
    assert_same(tensors(trainer), straight[1])
    told = [text for text in caplog.messages if "is torn" in text]
    assert len(told) == 1
    assert str(run / "checkpoint-4") in told[0] and str(run / "checkpoint-2") in told[0]
    return told[0]


@pytest.mark.parametrize("share", [0.0, 0.5, "all but one"])
@pytest.mark.parametrize("name", READ)
def test_a_torn_file_makes_a_torn_checkpoint(name, share, run):
    assert checkpoint_defect(str(run / "checkpoint-4")) is None
    path = run / "checkpoint-4" / name
    content = path.read_bytes()
    # The last byte of a text may be a line end, without which it is whole.
    end = content.rstrip()[:-1] if share == "all but one" else content[: int(share * len(content))]
    path.write_bytes(end)
    assert checkpoint_defect(str(run / "checkpoint-4")) == name


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_missing_file_makes_a_torn_checkpoint(name, run):
    (run / "checkpoint-4" / name).unlink()
    assert checkpoint_defect(str(run / "checkpoint-4")) == name


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "model.safetensors"])
def test_a_torn_checkpoint_is_passed_over(name, run, straight, parity_data, caplog):
    path = run / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert name in resume_and_compare(run, straight, parity_data, caplog)


@pytest.mark.parametrize("name", ["quant_noise_config.json", "quant_noise_state.safetensors"])
def test_a_checkpoint_without_its_noise_is_passed_over(name, run, straight, parity_data, caplog):
    """Its codebooks would be fitted anew."""
    (run / "checkpoint-4" / name).unlink()
    assert name in resume_and_compare(run, straight, parity_data, caplog)


def test_where_no_checkpoint_has_noise_the_newest_whole_one_is_taken(run, parity_data, caplog):
    for path in run.glob("checkpoint-*/quant_noise*"):
        path.unlink()
    trainer = make_trainer(run, parity_data)
    trainer.train(resume_from_checkpoint=True)
    assert "is torn" not in caplog.text
    assert "resumed at step 4, but" in caplog.text  # as the callback says of any such folder


@pytest.mark.parametrize("name", ["quant_noise_config.json", "quant_noise_state.safetensors"])
def test_half_of_the_noise_is_not_taken_for_all(name, run, parity_data, caplog):
    (run / "checkpoint-4" / name).unlink()
    trainer = make_trainer(run, parity_data)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert "holds no quantization noise" in caplog.text


def test_all_torn_is_an_error_that_names_the_way_out(run, parity_data):
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    trainer = make_trainer(run, parity_data)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=True)
    said = str(error.value)
    assert f"no checkpoint in {run} is whole" in said
    assert "checkpoint-2 is torn (trainer_state.json" in said
    assert "checkpoint-4 is torn (optimizer.pt" in said
    assert "without resume_from_checkpoint" in said
    trainer.train()  # which is that way


def test_no_checkpoint_is_for_trainer_to_say(tmp_path, parity_data):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make_trainer(tmp_path, parity_data).train(resume_from_checkpoint=True)


def test_a_named_checkpoint_is_taken_as_it_is(run, straight, parity_data):
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    trainer = make_trainer(run, parity_data)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert_same(tensors(trainer), straight[1])


def test_without_noise_too(tmp_path, parity_data):
    whole = make_trainer(tmp_path, parity_data, noise=None)
    whole.train()
    (tmp_path / "checkpoint-6" / "scheduler.pt").unlink()
    again = make_trainer(tmp_path, parity_data, noise=None)
    again.train(resume_from_checkpoint=True)
    assert_same(tensors(again), tensors(whole))


def test_a_checkpoint_of_the_model_alone_is_whole(tmp_path, parity_data):
    make_trainer(tmp_path, parity_data, save_only_model=True).train()
    newest = str(tmp_path / "checkpoint-6")
    assert not os.path.exists(os.path.join(newest, "optimizer.pt"))
    assert newest_complete_checkpoint(str(tmp_path), checkpoint_defect) == (newest, {})
    again = make_trainer(tmp_path, parity_data, save_only_model=True, max_steps=8)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


def write(folder, *names):
    """Small whole files by these names, and a state."""
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", *names):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"weight": torch.ones(2)}, path)
        elif name.endswith(".json"):
            path.write_text("{}")
        elif name.endswith((".pt", ".pth", ".bin")):
            torch.save({"a": 1}, path)
        else:
            path.write_text("global_step2" if name == "latest" else "")


STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WHOLE = {
    "adapter": ("adapter_model.safetensors", "adapter_config.json", *STATE),
    "two adapters": ("one/adapter_model.safetensors", "two/adapter_model.safetensors", *STATE),
    "weights of torch": ("pytorch_model.bin", *STATE),
    "several ranks": ("model.safetensors", *STATE[:2], "rng_state_0.pth", "rng_state_1.pth"),
    "fsdp, sharded": (
        "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "optimizer_0/__0_0.distcp",
        *STATE[1:],
    ),
    "fsdp, full": ("pytorch_model_fsdp.bin", "optimizer.bin", *STATE[1:]),
    "deepspeed": ("global_step2/mp_rank_00_model_states.pt", "latest", "rng_state_0.pth"),
    "scaled": ("model.safetensors", "scaler.pt", *STATE),
    "files of others": ("model.safetensors", "samples.jsonl", "notes", "runs/x.tfevents", *STATE),
}  # fmt: skip
TORN = {
    "an adapter's weights": ("adapter", "adapter_model.safetensors"),
    "a rank's random numbers": ("several ranks", "rng_state_1.pth"),
    "fsdp's optimizer": ("fsdp, sharded", "optimizer_0/.metadata"),
    "fsdp's weights": ("fsdp, full", "pytorch_model_fsdp.bin"),
    "deepspeed's last file": ("deepspeed", "latest"),
    "the scaler": ("scaled", "scaler.pt"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_other_kinds_of_checkpoints(kind, tmp_path):
    write(tmp_path / "a", *WHOLE[kind])
    assert checkpoint_defect(str(tmp_path / "a")) is None


@pytest.mark.parametrize("case", TORN)
def test_other_kinds_torn(case, tmp_path):
    kind, name = TORN[case]
    write(tmp_path / "a", *WHOLE[kind])
    path = tmp_path / "a" / name
    if name.endswith(".metadata"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-12])
    assert checkpoint_defect(str(tmp_path / "a")) == name


def test_a_missing_shard(tmp_path):
    folder = tmp_path / "a"
    write(folder, *SHARDS, *STATE)
    assert checkpoint_defect(str(folder)) == "model.safetensors"  # no list of them yet
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_defect(str(folder)) is None
    (folder / SHARDS[1]).unlink()
    assert checkpoint_defect(str(folder)) == SHARDS[1]


ON_RANKS = """
from hf_quantnoise.compression.trainer_checkpoints import checkpoint_to_resume_from

def flaw_of(checkpoint):
    if rank == 1 and checkpoint.endswith("-4"):
        return "model.safetensors"  # not on its machine
    return "optimizer.pt" if checkpoint.endswith(("-6", "-1")) else None

import os
for name in ("one/checkpoint-2", "one/checkpoint-6", "two/checkpoint-4", "three/checkpoint-1"):
    os.makedirs(f"{folder}/{name}", exist_ok=True)
dist.barrier()
found["one"] = checkpoint_to_resume_from(f"{folder}/one", flaw_of)
found["two"] = error_of(checkpoint_to_resume_from, f"{folder}/two", flaw_of)
found["three"] = error_of(checkpoint_to_resume_from, f"{folder}/three", flaw_of)
found["none"] = checkpoint_to_resume_from(f"{folder}/none", flaw_of)
"""


@needs_gloo
def test_the_first_of_several_ranks_says(tmp_path):
    first, second = on_two_ranks(ON_RANKS, tmp_path)
    assert first == second
    assert first["one"] == f"{tmp_path}/one/checkpoint-2" and first["none"] is None
    assert "folder that all machines share" in first["two"]
    assert f"no checkpoint in {tmp_path}/three is whole" in first["three"]


PROGRAM = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from datasets import load_from_disk
from safetensors.torch import save_file
from test_checkpoints import make_trainer, tensors

torch.set_num_threads(1)
folder, data = Path(sys.argv[3]), load_from_disk(sys.argv[4])
trainer = make_trainer(folder, data, save_steps=1)
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*/trainer_state.json")))
save_file(tensors(trainer), folder / "end.safetensors")
"""


@pytest.mark.slow
def test_sigkill_while_writing(tmp_path, parity_data):
    """A process is killed as soon as a new checkpoint has a file, until it gets through."""
    parity_data.save_to_disk(str(tmp_path / "data"))
    here = Path(__file__).parent

    def start(name):
        words = [str(here), str(here.parent), str(tmp_path / name), str(tmp_path / "data")]
        path = os.pathsep.join(sys.path)
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words], env={**os.environ, "PYTHONPATH": path}
        )

    assert start("straight").wait() == 0
    kills, torn = 0, 0
    for step, file in ((2, "config.json"), (4, "optimizer.pt"), (5, "scheduler.pt")):
        process = start("killed")
        seen = tmp_path / "killed" / f"checkpoint-{step}" / file
        while process.poll() is None and not seen.exists():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        torn += checkpoint_defect(str(seen.parent)) is not None
    assert kills == 3 and torn
    assert start("killed").wait() == 0
    ends = [load_file(tmp_path / name / "end.safetensors") for name in ("straight", "killed")]
    assert_same(*ends)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_killed_between_two_writes(name, straight, tmp_path, parity_data, monkeypatch, caplog):
    """All that is written before a file is there and whole, none of what comes after."""
    real = torch.save

    def save(value, path, *args, **kwargs):
        if str(path).endswith(os.path.join("checkpoint-4", name)):
            raise Killed
        return real(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(Killed):
        make_trainer(tmp_path, parity_data).train()
    monkeypatch.setattr(torch, "save", real)
    resume_and_compare(tmp_path, straight, parity_data, caplog)
