"""Interrupted compression runs resume and end with the model of an uninterrupted one, bit for
bit."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.stacked import make_stacked
from support.trainers import (
    Killed,
    assert_same_result,
    make_trainer,
    with_other_weights,
)

from hf_quantnoise import CompressionArguments, FixedPointConfig, IPQConfig
from hf_quantnoise.compression import checkpoints
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

PQ = {"block_size": 4, "n_centroids": 16}
CASES = {
    "ipq": (IPQConfig(**PQ), CompressionArguments()),
    "16-bit centroids": (IPQConfig(**PQ, codebook_bits=16), CompressionArguments(distill=False)),
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
    # The allocation is that of the uninterrupted run; other weights would get another.
    "target size": (IPQConfig(target_size_mb=0.05, codebook_bits=16), CompressionArguments()),
}
CONFIG, ARGUMENTS = CASES["ipq"]
# These differ from each other in the state that a checkpoint holds.
QUICK = ("ipq", "fewer layers", "int4", "target size")


def make_bert_trainer(folder, data, model=None, **changes):
    return make_trainer(
        folder,
        model or make_stacked("bert", 2),
        data,
        parts={"eval_dataset": data.select(range(16))},
        **{"save_strategy": "steps", "save_steps": 2, **changes},
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, parity_data):
    """The trainer of an uninterrupted run of the first case."""
    trainer = make_bert_trainer(tmp_path_factory.mktemp("uninterrupted"), parity_data)
    trainer.compress(CONFIG, ARGUMENTS)
    return trainer


@pytest.fixture
def resume_and_compare(uninterrupted, tmp_path, parity_data):
    """Return a function that resumes the run in ``tmp_path`` and compares its result."""

    def resume(model=None, resume=True):
        trainer = make_bert_trainer(tmp_path, parity_data, model)
        trainer.compress(CONFIG, ARGUMENTS, resume_from_checkpoint=resume)
        assert_same_result(trainer, uninterrupted)
        return trainer

    return resume


@pytest.fixture
def killed_in_step(tmp_path, parity_data, kill):
    """Return a function that starts a run in ``tmp_path`` and kills it in its n-th step."""

    def run(step):
        release = kill(StageTrainer, "training_step", step)
        with pytest.raises(Killed):
            make_bert_trainer(tmp_path, parity_data).compress(CONFIG, ARGUMENTS)
        release()

    return run


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_resume_inside_a_stage_is_exact(case, tmp_path, parity_data, kill):
    config, arguments = CASES[case]

    def trainer(name):
        model = make_stacked("bert", 4 if case == "fewer layers" else 2)
        return make_bert_trainer(tmp_path / name, parity_data, model)

    straight = trainer("a")
    straight.compress(config, arguments)
    release = kill(StageTrainer, "training_step", 5 if case == "int4" else 10)
    with pytest.raises(Killed):
        trainer("b").compress(config, arguments)
    release()
    resumed = trainer("b")
    with_other_weights(resumed.model)
    resumed.compress(config, arguments, resume_from_checkpoint=True)
    assert_same_result(resumed, straight)


# Files are renamed in this order: the tensors of the dense model, its folder, then for each stage
# the last files of three checkpoints, the stage's tensors and its folder.
@pytest.mark.parametrize("call", [1, 2, 3, 6, 7, 11, 12, 17])
def test_resume_after_a_kill_while_writing(call, tmp_path, parity_data, kill, resume_and_compare):
    release = kill(checkpoints.os, "replace", call)
    with pytest.raises(Killed):
        make_bert_trainer(tmp_path, parity_data).compress(CONFIG, ARGUMENTS)
    release()
    resume_and_compare()


def test_an_incomplete_checkpoint_is_skipped(killed_in_step, tmp_path, resume_and_compare):
    killed_in_step(6)
    newest = tmp_path / "compression" / "run-1" / "checkpoint-4"
    memory = newest / "memory.safetensors"
    memory.write_bytes(memory.read_bytes()[:-1])
    (newest / "model.safetensors").write_bytes(b"truncated")
    files = checkpoints.StageCheckpoints(str(tmp_path / "compression"))
    assert files.checkpoint(1).endswith("checkpoint-2")
    assert not newest.exists()
    resume_and_compare()


def test_files_are_flushed_before_their_folder_counts(tmp_path, parity_data, monkeypatch):
    """A machine may stop when a file has its name, but not yet its content."""
    flushed, renames = [], []

    def fsync(descriptor):
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    real = os.replace

    def replace(source, target):
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        files = {str(path) for path in folder.iterdir()}
        renames.append((Path(target).name, files - set(flushed)))
        flushed.extend([str(target)] if str(source) in flushed else [])
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    trainer = make_bert_trainer(tmp_path, parity_data, save_steps=2)
    trainer.compress(IPQConfig(**PQ, stages=["ffn"]), CompressionArguments(stage_steps=2))
    assert {"stage-0", "stage-1", "memory.safetensors"} <= {name for name, _ in renames}
    # The others are of a model that is saved to a new checkpoint, which has no list of files yet.
    of_run = [
        item for item in renames if item[0].startswith(("stage", "memory", "files", "tensor"))
    ]
    assert all(missing == set() for _, missing in of_run), of_run


@pytest.mark.parametrize("name", ["tensors.safetensors", "stage.json"])
def test_an_incomplete_stage_is_skipped(name, tmp_path, resume_and_compare, finished):
    finished(tmp_path)
    path = tmp_path / "compression" / "stage-3" / name
    path.write_bytes(path.read_bytes()[:-40])
    resume_and_compare()
    assert checkpoints.is_complete(str(tmp_path / "compression/stage-3/tensors.safetensors"))


@pytest.fixture
def finished(uninterrupted):
    """Return a function that copies the files of the uninterrupted run to another folder."""
    files = Path(uninterrupted.args.output_dir) / "compression"
    return lambda folder: checkpoints.shutil.copytree(files, folder / "compression")


@pytest.mark.parametrize(
    ("folder", "last"),
    [
        ("stage-1", "stage.json"),
        ("stage-1", "tensors.safetensors"),
        ("run-1", "memory.safetensors"),
        ("checkpoint-2", "memory.safetensors"),
    ],
)
def test_resume_after_a_kill_while_removing(
    folder, last, tmp_path, parity_data, monkeypatch, resume_and_compare
):
    """A folder is removed file by file; before the last one it may look complete."""
    real = checkpoints.shutil.rmtree

    def interrupted(path, *args, **kwargs):
        if Path(path).name != folder:
            return real(path, *args, **kwargs)
        for file in filter(Path.is_file, Path(path).rglob("*")):
            if file.name != last:
                file.unlink()
        raise Killed

    monkeypatch.setattr(checkpoints.shutil, "rmtree", interrupted)
    with pytest.raises(Killed):
        make_bert_trainer(tmp_path, parity_data).compress(CONFIG, ARGUMENTS)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", real)
    resume_and_compare()


def test_a_half_removed_run_is_not_resumed(
    tmp_path, parity_data, monkeypatch, resume_and_compare, finished
):
    finished(tmp_path)
    for path in (tmp_path / "compression").glob("stage-*/tensors.safetensors"):
        other = {
            name: tensor * 1.5 if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(other, path)
    # As after a kill: only the first file has been removed.
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(checkpoints.shutil, "rmtree", None)
        make_bert_trainer(tmp_path, parity_data).compress(CONFIG, ARGUMENTS)
    resume_and_compare()


def test_resumed_logs_continue(killed_in_step, uninterrupted, resume_and_compare):
    killed_in_step(9)
    resumed = resume_and_compare()

    def steps(trainer, name):
        logs = trainer.state.log_history
        return [(log["step"], log["compression/stage"]) for log in logs if name in log]

    assert steps(resumed, "compression/mb") == steps(uninterrupted, "compression/mb")
    assert [step for step, _ in steps(resumed, "compression/mb")] == [0, 6, 12, 18]
    error, errors = "compression/layer_error_max", [(0, 1), (6, 2), (12, 3)]
    assert steps(resumed, error) == steps(uninterrupted, error) == errors


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch, resume_and_compare, finished):
    finished(tmp_path)
    names = sorted(path.name for path in (tmp_path / "compression").iterdir())
    assert names == ["stage-0", "stage-3"]
    monkeypatch.setattr(StageTrainer, "training_step", None)  # training would fail
    resume_and_compare()


def test_without_resume_the_files_of_an_earlier_run_are_removed(
    tmp_path, parity_data, resume_and_compare
):
    other = IPQConfig(**{**PQ, "n_centroids": 8})
    make_bert_trainer(tmp_path, parity_data).compress(other, CompressionArguments(stage_epochs=0))
    resume_and_compare(resume=False)


def test_files_of_others_in_the_folder_are_kept(tmp_path, parity_data):
    """As with an ``output_dir`` of ".", where the user may have a folder of this name."""
    own = tmp_path / "compression"
    (own / "stage-two").mkdir(parents=True)
    for name in ("stage-two/notes.txt", "model.py"):
        (own / name).write_text("mine")
    for _ in range(2):
        trainer = make_bert_trainer(tmp_path, parity_data)
        trainer.compress(IPQConfig(**PQ), CompressionArguments(stage_epochs=0))
    (own / "stage-0.part").mkdir()
    checkpoints.StageCheckpoints(str(own)).clear()
    assert sorted(path.name for path in own.iterdir()) == ["model.py", "stage-two"]
    assert (own / "stage-two" / "notes.txt").read_text() == "mine"


def test_resume_without_files_starts_from_scratch(resume_and_compare):
    resume_and_compare()


def test_other_settings_and_models_are_refused(tmp_path, parity_data):
    one_shot = CompressionArguments(stage_epochs=0)
    make_bert_trainer(tmp_path, parity_data).compress(IPQConfig(**PQ), one_shot)

    def refused(match, config=CONFIG, arguments=one_shot, model=None, teacher=None, **changes):
        trainer = make_bert_trainer(tmp_path, parity_data, model, **changes)
        with pytest.raises(ValueError, match=match):
            trainer.compress(config, arguments, teacher=teacher, resume_from_checkpoint=True)

    refused("n_centroids=16.*now 8", IPQConfig(**{**PQ, "n_centroids": 8}))
    refused("stage_epochs=0.*now 1.0", arguments=ARGUMENTS)
    refused("teacher='a copy of the model'.*now 'a Bert", teacher=make_stacked("bert", 1))
    refused("model differs .* in bert.encoder.layer.2", model=make_stacked("bert", 3))
    refused("save_strategy='no'", save_strategy="no")


def test_save_strategy_no_writes_nothing(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path, parity_data, save_strategy="no")
    trainer.compress(IPQConfig(**PQ), CompressionArguments(stage_steps=1))
    assert not (tmp_path / "compression").exists()
