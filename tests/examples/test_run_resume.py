"""Runs that are resumed with ``--resume_compression`` in a folder with files of other runs."""

import re
import shutil

import pytest
from support.trainers import interrupted_noise

pytest.importorskip("datasets")

from hf_quantnoise.runs import compression_run

NOISE = ["--noise", "pq", "--noise_after_finetuning", "1", "--n_centroids", "8"]
NOISE += ["--stage_epochs", "0", "--seed", "7", "--save_steps", "1"]


@pytest.fixture
def interrupt():
    """Start a run that is interrupted at the second checkpoint of the training with noise."""

    def interrupt(start, *flags, **kwargs):
        with interrupted_noise(2):
            start(*flags, **kwargs)

    return interrupt


def weights(folder) -> bytes:
    return (folder / "compressed" / "model.safetensors").read_bytes()


def test_resumed_run_does_not_use_the_stages_of_an_earlier_one(start, write_sets, interrupt):
    files = [*write_sets(), *NOISE]
    other = [*files, "--max_train_samples", "48"]
    _, expected = start(*other, out="expected")
    start(*files)
    interrupt(start, *other)
    _, folder = start(*other, "--resume_compression")
    assert weights(folder) == weights(expected)


def test_run_killed_after_the_finetuning_has_no_noise_of_an_earlier_one(
    start, write_sets, interrupt, monkeypatch
):
    files = [*write_sets(), *NOISE]
    other = [*files, "--max_train_samples", "48"]
    _, expected = start(*other, out="expected")
    interrupt(start, *files)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compression_run, "train_with_noise", killed)
        start(*other)
    _, folder = start(*other, "--resume_compression")
    assert weights(folder) == weights(expected)


def test_resumed_run_with_other_flags_is_refused(start, write_sets, interrupt, tmp_path):
    files = [*write_sets(), *NOISE]
    interrupt(start, *files)
    for flag, value in (("n_centroids", "16"), ("max_train_samples", "48"), ("seed", "8")):
        with pytest.raises(ValueError, match=rf"--{flag} \w+ \(now {value}\).*the same flags"):
            start(*files, f"--{flag}", value, "--resume_compression")
    # Files may be in another folder.
    (tmp_path / "train.csv").rename(tmp_path / "moved.csv")
    files[files.index("--train_file") + 1] = str(tmp_path / "moved.csv")
    results, _ = start(*files, "--resume_compression")
    assert results["reloaded"]["logits_bit_equal"]


def test_resumed_run_with_other_labels_is_refused(start, write_sets, interrupt):
    files = [*write_sets(), *NOISE]
    interrupt(start, *files)
    write_sets(names=("dull", "great"))
    with pytest.raises(
        ValueError, match=r"model has the 2 labels \['0', '1'\], the data .*'great'"
    ):
        start(*files, "--resume_compression")


def test_new_run_removes_only_its_own_files(start, write_sets, tmp_path):
    mine = [tmp_path / "out" / name / "mine.txt" for name in ("noise", "compression")]
    for file in mine:
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    flags = [*write_sets(), *NOISE]
    start(*flags)
    noise = mine[0].parent
    assert (noise / "checkpoint-1").is_dir()
    for name in ("allocation.json", "allocation.json.part"):
        (noise / name).write_text("{}")
    start(*flags, "--noise", "none", "--noise_after_finetuning", "0")
    assert [file.read_text() for file in mine] == ["mine", "mine"]
    assert [path.name for path in noise.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("dense", ["teacher"]),
        ("checkpoint-1", ["teacher"]),
        ("noise/checkpoint-1", ["teacher", "model", "checkpoint"]),
        ("noise/mine", []),
    ],
)
def test_models_that_the_run_replaces_are_refused(start, write_sets, name, flags):
    given = [*write_sets(), *NOISE]
    _, folder = start(*given)
    shutil.copytree(folder / "dense", folder / "noise" / "mine")
    path = str(folder / name)
    words = {
        "teacher": ["--teacher_name_or_path", path],
        "model": ["--model_name_or_path", path],
        "checkpoint": ["--resume_from_checkpoint", path],
    }
    for flag in flags:
        message = rf"{words[flag][0]} {re.escape(path)} is a part of the run .*another --output_dir"
        with pytest.raises(ValueError, match=message):
            start(*given, *words[flag])
    assert (folder / name).is_dir()
    start(*given, *words["teacher"], out="out" if name == "noise/mine" else "other")


def test_missing_checkpoint_of_the_finetuning_is_named(start, write_sets):
    message = r"--resume_from_checkpoint 'True': no such folder; pass .*checkpoint-500"
    with pytest.raises(ValueError, match=message):
        start(*write_sets(), "--resume_from_checkpoint", "True")
