"""Noise training resumes from the newest complete checkpoint."""

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
from support.tiny import make_model
from support.trainers import Killed, assert_same, make_trainer, tensors
from transformers import TrainerState

from hf_quantnoise import QuantNoiseConfig
from hf_quantnoise.compression.trainer_checkpoints import checkpoint_defect

PQ = QuantNoiseConfig(noise="pq", p=0.2, n_centroids=16, codebook_update=2)
TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
NOISE = ("quant_noise_config.json", "quant_noise_state.safetensors")
READ = ("config.json", "model.safetensors", "trainer_state.json", *TRAINING_STATE, *NOISE)


def make_bert_trainer(folder, data, noise=PQ, **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, **changes}
    return make_trainer(folder, make_model("bert"), data, noise, **settings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, parity_data):
    """The folder of a run of 6 steps with a checkpoint every 2, and its final weights."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = make_bert_trainer(folder, parity_data)
    trainer.train()
    return folder, tensors(trainer.model)


@pytest.fixture
def run(uninterrupted, tmp_path):
    """A copy of that folder, as if the run had been killed after 4 steps."""
    folder = tmp_path / "a run"
    shutil.copytree(uninterrupted[0], folder)
    shutil.rmtree(folder / "checkpoint-6")
    return folder


def resume_and_compare(run, uninterrupted, data, caplog):
    """Resume from the first checkpoint, compare the weights, and return the warning."""
    trainer = make_bert_trainer(run, data)
    steps, training_step = [], trainer.training_step
    trainer.training_step = lambda *args: steps.append(0) or training_step(*args)
    trainer.train(resume_from_checkpoint=True)
    assert len(steps) == 4  # from 2 to 6
    assert_same(tensors(trainer.model), uninterrupted[1])
    (warning,) = [text for text in caplog.messages if "incomplete" in text]
    assert str(run / "checkpoint-4") in warning
    assert str(run / "checkpoint-2") in warning
    return warning


# ---- which checkpoints are complete --------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, "all but one"])
@pytest.mark.parametrize("name", READ)
def test_a_truncated_file_is_found(name, share, run):
    folder = run / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == {*READ, "training_args.bin"}
    assert checkpoint_defect(str(folder)) is None
    content = (folder / name).read_bytes()
    # Without its last byte, which may be a newline, a text could still be complete.
    end = content.rstrip()[:-1] if share == "all but one" else content[: int(share * len(content))]
    (folder / name).write_bytes(end)
    assert checkpoint_defect(str(folder)) == name


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", *TRAINING_STATE])
def test_a_missing_file_is_found(name, run):
    (run / "checkpoint-4" / name).unlink()
    assert checkpoint_defect(str(run / "checkpoint-4")) == name


@pytest.mark.parametrize("name", NOISE)
def test_a_required_file_is_found_missing(name, run):
    (run / "checkpoint-4" / name).unlink()
    assert checkpoint_defect(str(run / "checkpoint-4")) is None
    assert checkpoint_defect(str(run / "checkpoint-4"), NOISE) == name


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors",),  # save_only_model
        ("adapter_model.safetensors", *TRAINING_STATE),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", *TRAINING_STATE),
        ("model.safetensors", *TRAINING_STATE[:2], "rng_state_0.pth", "rng_state_1.pth"),
        ("pytorch_model_fsdp.bin", "optimizer.bin", *TRAINING_STATE[1:]),
        ("global_step2/states.pt", "latest", "rng_state_0.pth"),  # DeepSpeed
        ("model.safetensors", "samples.jsonl", "metrics.json", "notes.pt", *TRAINING_STATE),
    ],
    ids=lambda names: names[0],
)
def test_other_kinds_of_checkpoints_are_complete(names, tmp_path):
    for name in ("trainer_state.json", *names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"weight": torch.ones(2)}, path)
        elif name == "trainer_state.json":
            path.write_text("{}")
        elif name.endswith((".pt", ".pth", ".bin")) and name != "notes.pt":
            torch.save({"a": 1}, path)
        else:
            path.write_text("text")
    assert checkpoint_defect(str(tmp_path)) is None


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "model.safetensors"])
def test_a_checkpoint_with_a_truncated_file_is_skipped(
    name, run, uninterrupted, parity_data, caplog
):
    path = run / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert name in resume_and_compare(run, uninterrupted, parity_data, caplog)


@pytest.mark.parametrize("name", NOISE)
def test_a_checkpoint_without_its_noise_is_skipped(name, run, uninterrupted, parity_data, caplog):
    """Otherwise its codebooks would be fitted again."""
    (run / "checkpoint-4" / name).unlink()
    assert name in resume_and_compare(run, uninterrupted, parity_data, caplog)


@pytest.mark.parametrize("name", TRAINING_STATE)
def test_a_kill_between_two_writes(name, uninterrupted, tmp_path, parity_data, monkeypatch, caplog):
    """All files before this one are complete; the following ones are missing."""
    real = torch.save

    def save(value, path, *args, **kwargs):
        if str(path).endswith(os.path.join("checkpoint-4", name)):
            raise Killed
        return real(value, path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", save)
        make_bert_trainer(tmp_path, parity_data).train()
    resume_and_compare(tmp_path, uninterrupted, parity_data, caplog)


def test_a_checkpoint_is_complete_only_with_its_noise(tmp_path, parity_data, monkeypatch):
    """A process may be killed at any time; ``trainer_state.json`` makes a checkpoint complete."""
    seen, real = [], TrainerState.save_to_json

    def watched(state, path):
        seen.append({name for name in NOISE if Path(path).with_name(name).is_file()})
        return real(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", watched)
    make_bert_trainer(tmp_path, parity_data).train()
    assert seen == [set(NOISE)] * 3


def test_without_noise_in_any_checkpoint_the_newest_is_used(run, parity_data, caplog):
    for path in run.glob("checkpoint-*/quant_noise*"):
        path.unlink()
    make_bert_trainer(run, parity_data).train(resume_from_checkpoint=True)
    assert "incomplete" not in caplog.text
    assert "resumed at step 4, but" in caplog.text  # a warning of the callback


@pytest.mark.parametrize("name", NOISE)
def test_a_checkpoint_with_half_of_its_noise_is_reported(name, run, parity_data, caplog):
    (run / "checkpoint-4" / name).unlink()
    trainer = make_bert_trainer(run, parity_data)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert "has no quantization noise" in caplog.text


def test_only_incomplete_checkpoints_raise(run, parity_data):
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    trainer = make_bert_trainer(run, parity_data)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=True)
    message = str(error.value)
    assert f"no checkpoint in {run} is complete" in message
    assert "checkpoint-2 (trainer_state.json" in message
    assert "checkpoint-4 (optimizer.pt" in message
    assert "without resume_from_checkpoint" in message


def test_no_checkpoint_raises_as_in_trainer(tmp_path, parity_data):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make_bert_trainer(tmp_path, parity_data).train(resume_from_checkpoint=True)


def test_a_given_checkpoint_is_used_whatever_the_others_are(run, uninterrupted, parity_data):
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    trainer = make_bert_trainer(run, parity_data)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert_same(tensors(trainer.model), uninterrupted[1])


def test_training_without_noise_resumes(tmp_path, parity_data):
    straight = make_bert_trainer(tmp_path, parity_data, noise=None)
    straight.train()
    (tmp_path / "checkpoint-6" / "scheduler.pt").unlink()
    resumed = make_bert_trainer(tmp_path, parity_data, noise=None)
    resumed.train(resume_from_checkpoint=True)
    assert_same(tensors(resumed.model), tensors(straight.model))


ON_RANKS = """
import json, os
from safetensors.torch import save_file
from hf_quantnoise.compression.trainer_checkpoints import checkpoint_to_resume_from

# Each rank has its own disk.
disk = f"{folder}/{rank}"

def write(name, is_complete=True):
    os.makedirs(f"{disk}/{name}")
    with open(f"{disk}/{name}/trainer_state.json", "w") as file:
        file.write("{}" if is_complete else "{")
    save_file({"weight": torch.ones(1)}, f"{disk}/{name}/model.safetensors")

write("one/checkpoint-2")
write("one/checkpoint-6", is_complete=False)
write("two/checkpoint-4", is_complete=rank == 0)
write("three/checkpoint-1", is_complete=False)
if rank == 0:
    write("four/checkpoint-3")
found["one"] = checkpoint_to_resume_from(f"{disk}/one")
for name in ("two", "three", "four"):
    found[name] = error_of(checkpoint_to_resume_from, f"{disk}/{name}")
found["none"] = checkpoint_to_resume_from(f"{disk}/none")
"""


@needs_gloo
def test_rank_0_decides(tmp_path):
    ranks = on_two_ranks(ON_RANKS, tmp_path)
    for rank, found in enumerate(ranks):
        assert found["one"] == f"{tmp_path}/{rank}/one/checkpoint-2"
        assert found["none"] is None
        for name in ("two/checkpoint-4", "four/checkpoint-3"):
            assert f"{tmp_path}/1/{name}" in found[name.partition("/")[0]]
        assert f"no checkpoint in {tmp_path}/{rank}/three is complete" in found["three"]


PROGRAM = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from datasets import load_from_disk
from safetensors.torch import save_file
from support.trainers import tensors
from test_trainer_checkpoints import make_bert_trainer

torch.set_num_threads(1)
folder, data = Path(sys.argv[3]), load_from_disk(sys.argv[4])
trainer = make_bert_trainer(folder, data, save_steps=1)
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*/trainer_state.json")))
save_file(tensors(trainer.model), folder / "end.safetensors")
"""


@pytest.mark.slow
def test_sigkill_while_writing(tmp_path, parity_data):
    """A process is killed as soon as a new checkpoint has a certain file, then finishes."""
    parity_data.save_to_disk(str(tmp_path / "data"))
    here = Path(__file__).parent

    def start(name):
        folders = [str(here), str(here.parent), str(tmp_path / name), str(tmp_path / "data")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *folders], env=environment)

    assert start("straight").wait() == 0
    kills, incomplete = 0, 0
    for step, file in ((2, "config.json"), (4, "optimizer.pt"), (5, "scheduler.pt")):
        process = start("killed")
        written = tmp_path / "killed" / f"checkpoint-{step}" / file
        while process.poll() is None and not written.exists():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        incomplete += checkpoint_defect(str(written.parent)) is not None
    assert kills == 3
    assert incomplete
    assert start("killed").wait() == 0
    ends = [load_file(tmp_path / name / "end.safetensors") for name in ("straight", "killed")]
    assert_same(*ends)
