"""A pass that was killed goes on and ends with the model of an undisturbed one, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.stacked import make_stacked
from support.stage_runs import Killed, assert_same, compare, make_pass_trainer, spoilt

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
)
from hf_quantnoise.compression import checkpoints
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

PQ = {"block_size": 4, "n_centroids": 16}
CASES = {
    "ipq": (IPQConfig(**PQ), CompressionArguments()),
    "half centroids": (IPQConfig(**PQ, codebook_bits=16), CompressionArguments(distill=False)),
    "int8 centroids and inputs": (
        IPQConfig(**PQ, codebook_bits=8, activation_bits=8),
        CompressionArguments(stage_steps=4),
    ),
    "fewer layers": (
        IPQConfig(**PQ, share_layers=2, prune_layers="every_other"),
        CompressionArguments(),
    ),
    "row scales": (IPQConfig(**PQ, row_scale=True, codebook_bits=16), CompressionArguments()),
    "two codebooks": (
        IPQConfig(**PQ, n_codebooks=2, importance="activations"),
        CompressionArguments(stage_steps=4),
    ),
    "int4": (FixedPointConfig(bits=4), CompressionArguments()),
    # The allotment is that of the undisturbed pass: spoilt weights would be given another.
    "a size on disk": (IPQConfig(target_size_mb=0.05, codebook_bits=16), CompressionArguments()),
}


def make_trainer(folder, data, model=None, **changes):
    return make_pass_trainer(
        folder,
        model or make_stacked("bert", 4),
        data,
        parts={"eval_dataset": data.select(range(16))},
        **{"save_strategy": "steps", "save_steps": 2, **changes},
    )


# What differs from others in the state that a checkpoint holds; the rest takes a minute more.
QUICK = ("ipq", "fewer layers", "row scales", "int4", "a size on disk")


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_killed_inside_a_stage(case, tmp_path, parity_data, kill):
    config, arguments = CASES[case]
    straight = make_trainer(tmp_path / "a", parity_data)
    straight.compress(config, arguments)
    release = kill(StageTrainer, "training_step", 5 if case == "int4" else 10)
    with pytest.raises(Killed):
        make_trainer(tmp_path / "b", parity_data).compress(config, arguments)
    release()
    again = make_trainer(tmp_path / "b", parity_data, model=spoilt(make_stacked("bert", 4)))
    again.compress(config, arguments, resume_from_checkpoint=True)
    compare(again, straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, parity_data):
    trainer = make_trainer(tmp_path_factory.mktemp("straight"), parity_data)
    trainer.compress(*CASES["ipq"])
    return trainer


# Files are moved to their places in this order: the dense model's tensors, its folder, then for
# each stage three checkpoints' last files, the stage's tensors, its folder.
@pytest.mark.parametrize("call", [1, 2, 3, 6, 7, 11, 12, 17])
def test_killed_while_writing(call, straight, tmp_path, parity_data, kill):
    release = kill(checkpoints.os, "replace", call)
    with pytest.raises(Killed):
        make_trainer(tmp_path, parity_data).compress(*CASES["ipq"])
    release()
    again = make_trainer(tmp_path, parity_data)
    again.compress(*CASES["ipq"], resume_from_checkpoint=True)
    compare(again, straight)


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(
    straight, tmp_path, parity_data, kill, caplog
):
    release = kill(StageTrainer, "training_step", 6)
    with pytest.raises(Killed):
        make_trainer(tmp_path, parity_data).compress(*CASES["ipq"])
    release()
    newest = tmp_path / "compression" / "run-1" / "checkpoint-4"
    assert (newest / "memory.safetensors").is_file()
    whole = (newest / "memory.safetensors").read_bytes()
    (newest / "memory.safetensors").write_bytes(whole[:-1])
    (newest / "model.safetensors").write_bytes(b"torn")
    files = checkpoints.StageCheckpoints(str(tmp_path / "compression"))
    assert files.checkpoint(1).endswith("checkpoint-2")
    assert not newest.exists()
    again = make_trainer(tmp_path, parity_data)
    again.compress(*CASES["ipq"], resume_from_checkpoint=True)
    compare(again, straight)


def test_what_a_folder_vouches_for_is_on_the_disk_first(tmp_path, parity_data, monkeypatch):
    """Machines stop, too, with files that are named and not yet written."""
    done, moves = [], []

    def fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    real = os.replace

    def replace(source, target):
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        files = {str(path) for path in folder.iterdir()}
        moves.append((Path(target).name, files - set(done)))
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    config = IPQConfig(**PQ, stages=["ffn"])
    trainer = make_trainer(tmp_path, parity_data, save_steps=6)
    trainer.compress(config, CompressionArguments())
    names = [name for name, _ in moves]
    assert {"stage-0", "stage-1", "memory.safetensors"} <= set(names)
    assert all(late == set() for _, late in moves), moves


TORN = {
    "tensors of the last stage": ("stage-3", "tensors.safetensors"),
    "record of the last stage": ("stage-3", "stage.json"),
    "tensors of the dense model": ("stage-0", "tensors.safetensors"),
}


@pytest.mark.parametrize("case", TORN)
def test_a_torn_stage_is_passed_over(case, straight, tmp_path, parity_data):
    make_trainer(tmp_path, parity_data).compress(*CASES["ipq"])
    folder, name = TORN[case]
    path = tmp_path / "compression" / folder / name
    path.write_bytes(path.read_bytes()[:-40])
    again = make_trainer(tmp_path, parity_data)
    again.compress(*CASES["ipq"], resume_from_checkpoint=True)
    compare(again, straight)
    assert checkpoints.is_whole(tmp_path / "compression" / "stage-3" / "tensors.safetensors")


@pytest.mark.parametrize(
    ("folder", "last"),
    [
        ("stage-1", "stage.json"),
        ("stage-1", "tensors.safetensors"),
        ("run-1", "memory.safetensors"),
        ("checkpoint-2", "memory.safetensors"),
    ],
)
def test_killed_while_removing(folder, last, straight, tmp_path, parity_data, monkeypatch):
    """A folder goes file by file; killed before the last one, it looks like a whole one."""
    real = checkpoints.shutil.rmtree

    def torn(path, *args, **kwargs):
        if Path(path).name != folder:
            return real(path, *args, **kwargs)
        for file in filter(Path.is_file, Path(path).rglob("*")):
            if file.name != last:
                file.unlink()
        raise Killed

    monkeypatch.setattr(checkpoints.shutil, "rmtree", torn)
    with pytest.raises(Killed):
        make_trainer(tmp_path, parity_data).compress(*CASES["ipq"])
    monkeypatch.setattr(checkpoints.shutil, "rmtree", real)
    again = make_trainer(tmp_path, parity_data)
    again.compress(*CASES["ipq"], resume_from_checkpoint=True)
    compare(again, straight)


def test_half_of_an_earlier_pass_is_none_to_go_on_from(
    straight, tmp_path, parity_data, monkeypatch
):
    other = make_trainer(tmp_path, parity_data, model=spoilt(make_stacked("bert", 4)))
    other.compress(*CASES["ipq"])
    real = checkpoints.shutil.rmtree
    monkeypatch.setattr(checkpoints.shutil, "rmtree", None)
    with pytest.raises(TypeError):  # stands for a kill: all but the first file is left
        make_trainer(tmp_path, parity_data).compress(*CASES["ipq"])
    monkeypatch.setattr(checkpoints.shutil, "rmtree", real)
    again = make_trainer(tmp_path, parity_data)
    again.compress(*CASES["ipq"], resume_from_checkpoint=True)
    compare(again, straight)


def test_the_logs_go_on_where_they_were(straight, tmp_path, parity_data, kill):
    release = kill(StageTrainer, "training_step", 9)
    with pytest.raises(Killed):
        make_trainer(tmp_path, parity_data).compress(*CASES["ipq"])
    release()
    again = make_trainer(tmp_path, parity_data)
    again.compress(*CASES["ipq"], resume_from_checkpoint=True)

    def steps(trainer, name):
        logs = trainer.state.log_history
        return [(log["step"], log["compression_stage"]) for log in logs if name in log]

    assert steps(again, "compression_mb") == steps(straight, "compression_mb")
    assert [step for step, _ in steps(again, "compression_mb")] == [0, 6, 12, 18]
    error = "compression_error/bert.encoder.layer.0.attention.self.query"
    assert steps(again, error) == steps(straight, error) == [(12, 3)]


def test_a_finished_pass_is_not_done_again(straight, tmp_path, parity_data, monkeypatch):
    first = make_trainer(tmp_path, parity_data)
    first.compress(*CASES["ipq"])
    kept = sorted(path.name for path in (tmp_path / "compression").iterdir())
    assert kept == ["stage-0", "stage-3"]
    monkeypatch.setattr(StageTrainer, "training_step", None)  # nothing is trained any more
    again = make_trainer(tmp_path, parity_data)
    again.compress(*CASES["ipq"], resume_from_checkpoint=True)
    compare(again, straight)


def test_without_resuming_an_earlier_pass_is_forgotten(straight, tmp_path, parity_data):
    other = IPQConfig(**{**PQ, "n_centroids": 8})
    make_trainer(tmp_path, parity_data).compress(other, CompressionArguments(stage_epochs=0))
    again = make_trainer(tmp_path, parity_data)
    again.compress(*CASES["ipq"])
    compare(again, straight)


def test_resuming_where_nothing_was_left_begins(straight, tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data)
    trainer.compress(*CASES["ipq"], resume_from_checkpoint=True)
    compare(trainer, straight)


def test_another_pass_or_model_is_refused(tmp_path, parity_data):
    def trainer(model=None, **changes):
        return make_trainer(tmp_path, parity_data, model=model, **changes)

    one_shot = CompressionArguments(stage_epochs=0)
    trainer().compress(IPQConfig(**PQ), one_shot)
    with pytest.raises(ValueError, match="begun with n_centroids=16, now it is 8; take the same"):
        config = IPQConfig(**{**PQ, "n_centroids": 8})
        trainer().compress(config, one_shot, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="begun with stage_epochs=0, now it is 1.0"):
        trainer().compress(IPQConfig(**PQ), resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match="begun with teacher='a copy of the model', now it is 'a Be"
    ):
        other = make_stacked("bert", 2)
        trainer().compress(IPQConfig(**PQ), one_shot, teacher=other, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="model is another than the one that was compressed"):
        larger = trainer(make_stacked("bert", 5))
        larger.compress(IPQConfig(**PQ), one_shot, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="nothing to go on from with save_strategy='no'"):
        quiet = trainer(save_strategy="no")
        quiet.compress(IPQConfig(**PQ), one_shot, resume_from_checkpoint=True)


def test_with_save_strategy_no_nothing_is_written(tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data, save_strategy="no")
    trainer.compress(IPQConfig(**PQ), CompressionArguments(stage_steps=1))
    assert not (tmp_path / "compression").exists()


PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from datasets import load_from_disk
from safetensors.torch import save_file
from stage_runs import tensors
from test_resume import CASES, make_trainer

torch.set_num_threads(1)
folder = Path(sys.argv[2])
trainer = make_trainer(folder / sys.argv[3], load_from_disk(str(folder / "data")))
trainer.compress(*CASES["ipq"], resume_from_checkpoint=True)
save_file(tensors(trainer.model), folder / f"{sys.argv[3]}.safetensors")
"""


@pytest.mark.slow
def test_sigkill_again_and_again(tmp_path, parity_data):
    """A process is killed whenever a new file has come, until it gets through in one go."""
    parity_data.save_to_disk(str(tmp_path / "data"))
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), *sys.path])

    def start(name):
        words = [sys.executable, "-c", PROGRAM, str(here), str(tmp_path), name]
        return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths})

    assert start("straight").wait() == 0
    kills = 0
    for patience in (1, 4, 9, 14, 19, 24, 10**6):
        process, seen = start("killed"), set()
        while process.poll() is None:
            for folder, _, names in os.walk(tmp_path / "killed"):  # folders may go meanwhile
                seen |= {os.path.join(folder, name) for name in names if "safetensors" in name}
            if len(seen) >= patience:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
    assert kills >= 3
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("straight", "killed"))
    assert_same(one, other)
