"""A resumed run notices every damaged file: it ends with the same model, or names the file."""

import re
import shutil

import pytest
from support.stacked import make_stacked
from support.trainers import Killed, assert_same_result, make_trainer, with_other_weights

from hf_quantnoise import CompressionArguments, IPQConfig
from hf_quantnoise.compression.checkpoints import StageCheckpoints
from hf_quantnoise.compression.training.stage_trainer import StageTrainer

CONFIG = IPQConfig(block_size=4, n_centroids=16, stages=["ffn", "attention"])
SETTINGS = CompressionArguments(stage_steps=5, plots=False)
CHECKPOINT = [
    "config.json", "files.json", "memory.safetensors", "model.safetensors", "optimizer.pt",
    "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin",
]  # fmt: skip
STAGE = ["files.json", "stage.json", "tensors.safetensors"]
# Folders of a run that is killed in its second stage -> their files.
FOLDERS = {
    "stage-0": STAGE,
    "stage-1": STAGE,
    "run-2/checkpoint-2": CHECKPOINT,
    "run-2/checkpoint-4": CHECKPOINT,
}


def _flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "removed": None,
    "truncated": lambda content: content.rstrip()[:-1],
    "half": lambda content: content[: len(content) // 2],
    "flipped": _flip,
    "emptied": lambda content: b"",
    "{}": lambda content: b"{}",
}


def compress(folder, data, resume=False):
    trainer = make_trainer(
        folder, make_stacked("bert", 1), data, save_strategy="steps", save_steps=2
    )
    if resume:
        with_other_weights(trainer.model)
    trainer.compress(CONFIG, SETTINGS, resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory, parity_data):
    return compress(tmp_path_factory.mktemp("straight"), parity_data)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, parity_data):
    """The folder of a run that was killed in the last step of its second stage."""
    folder, steps = tmp_path_factory.mktemp("killed"), []

    def training_step(*args, real=StageTrainer.training_step):
        steps.append(0)
        if len(steps) == 10:
            raise Killed
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageTrainer, "training_step", training_step)
        compress(folder, parity_data)
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("compression/**/*")
        if path.is_file()
    }
    assert found == {f"compression/{f}/{name}" for f, names in FOLDERS.items() for name in names}
    return folder


@pytest.fixture
def assert_noticed(killed, straight, tmp_path, parity_data, caplog):
    """Return a function that damages a file of the run, resumes, and checks the end."""

    def check(folder, name, damage):
        run = tmp_path / damage
        shutil.copytree(killed, run)
        path = run / "compression" / folder / name
        content = path.read_bytes()
        change = DAMAGES[damage]
        path.unlink() if change is None else path.write_bytes(change(content))
        caplog.clear()
        # Without its list, a folder is like those of earlier releases; here its files are complete.
        is_old = (name, damage) == ("files.json", "removed")
        if folder == "stage-0" and not is_old:
            with pytest.raises(ValueError, match=re.escape(f"{path} is missing or damaged")):
                compress(run, parity_data, resume=True)
            return
        resumed = compress(run, parity_data, resume=True)
        assert_same_result(resumed, straight)
        is_read = folder != "run-2/checkpoint-2" and not is_old
        assert (f"skipping {path.parent}: {name} is" in caplog.text) == is_read

    return check


@pytest.mark.parametrize("damage", ["removed", "flipped"])
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("stage-0", "tensors.safetensors"),
        ("stage-1", "stage.json"),
        ("run-2/checkpoint-4", "optimizer.pt"),
        ("run-2/checkpoint-4", "files.json"),
    ],
)
def test_a_damaged_file_is_noticed(folder, name, damage, assert_noticed):
    assert_noticed(folder, name, damage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder, names in FOLDERS.items() for name in names]
)
def test_every_damage_to_every_file_is_noticed(folder, name, assert_noticed):
    for damage in DAMAGES:
        assert_noticed(folder, name, damage)


@pytest.mark.parametrize("name", ["stage.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "half", "emptied", "{}"])
def test_folders_without_a_list_are_checked_for_truncation(name, damage, killed, tmp_path):
    """Earlier releases wrote no list."""
    shutil.copytree(killed / "compression", tmp_path / "compression")
    for path in tmp_path.rglob("files.json"):
        path.unlink()
    files = StageCheckpoints(str(tmp_path / "compression"), writes=False)
    assert [stage.number for stage in files.stages()] == [0, 1]
    path = tmp_path / "compression" / "stage-1" / name
    change = DAMAGES[damage]
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    assert [stage.number for stage in files.stages()] == [0]


def test_checkpoints_without_a_list_resume(killed, straight, tmp_path, parity_data):
    shutil.copytree(killed, tmp_path / "run")
    for path in (tmp_path / "run").rglob("files.json"):
        path.unlink()
    (tmp_path / "run/compression/run-2/checkpoint-4/optimizer.pt").unlink()
    assert_same_result(compress(tmp_path / "run", parity_data, resume=True), straight)
