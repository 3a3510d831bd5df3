"""A shortened run of the demo, and its output."""

import contextlib
import io

import demo
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from hf_quantnoise.runs.closing_table import Row, closing_table, weights_mb

SHORT = ["--epochs", "0.1", "--compression_epochs", "0.1"]  # a few steps of each
FOLDERS = ("float32", "no_noise_one_shot", "no_noise_finetuned", "noise_one_shot")
FOLDERS += ("noise_finetuned",)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A shortened demo: its folder, returned rows, and printed text."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        rows = demo.main(["--output_dir", str(folder), *SHORT])
    return folder, rows, out.getvalue()


def test_closing_table_has_the_sizes_and_scores_of_the_files(run):
    folder, rows, printed = run
    assert f"\n\n{closing_table(rows, 'accuracy', 'loss')}\n\n" in printed
    assert [row.megabytes for row in rows] == [weights_mb(folder / name) for name in FOLDERS]
    assert all(rows[0].megabytes > 40 * row.megabytes for row in rows[1:])
    _, test = demo.load_data()
    truth = torch.tensor([example["labels"] for example in test])
    for name, row in zip(FOLDERS, rows, strict=True):
        model = AutoModelForImageClassification.from_pretrained(folder / name)
        answers = demo.logits(model, test)
        assert row.score == pytest.approx((answers.argmax(-1) == truth).float().mean().item())
        assert row.more[0] == pytest.approx(cross_entropy(answers, truth).item(), rel=1e-4)


def test_each_way_gives_another_model_and_none_changes_the_float32_one(run):
    folder, rows, _ = run
    assert len({row.more for row in rows}) == len(rows)
    _, test = demo.load_data()
    models = [AutoModelForImageClassification.from_pretrained(folder / n) for n in FOLDERS]
    one_shot = demo.quantize_model(models[0], demo.TARGET())
    assert torch.equal(demo.logits(one_shot, test), demo.logits(models[1], test))


def test_printed_path_is_that_of_the_picture(run):
    folder, _, printed = run
    path = printed.rstrip().rpartition("Picture: ")[2]
    assert path == str((folder / "accuracy.png").resolve())
    assert Image.open(path).size == (1200, 480)


def test_different_logits_after_loading_are_an_error(monkeypatch, tmp_path):
    options = demo.parse_arguments(["--output_dir", str(tmp_path)])
    trainings = demo.Demo(options, [], demo.load_data()[1])
    answers = iter([torch.zeros(1), torch.ones(1)])
    monkeypatch.setattr(demo, "logits", lambda *_: next(answers))
    with pytest.raises(RuntimeError, match="other logits"):
        demo.saved_and_scored(trainings, "float32", demo.make_model())


@pytest.mark.parametrize(("held_out", "sizes"), [(False, (1437, 360)), (True, (1150, 287))])
def test_sets_of_digits_are_apart(held_out, sizes):
    train, test = demo.load_data(held_out)
    assert (len(train), len(test)) == sizes
    both = torch.stack([example["pixel_values"] for example in train + test])
    training = torch.stack([example["pixel_values"] for example in demo.load_data()[0]])
    digits = torch.tensor(demo.load_digits().images, dtype=torch.float32) / 8 - 1
    # Each digit once: both sides sorted as rows of pixels. Held-out ones are training digits.
    whole = training if held_out else digits
    assert sorted(both.flatten(1).tolist()) == sorted(whole.flatten(1).tolist())


def test_times_smaller_is_relative_to_the_first_row():
    text = closing_table([Row("a", 12.0, 0.5), Row("longer name", 0.5, None)], "f1")
    head, rule, first, second = text.splitlines()
    assert head.split() == ["model", "MB", "on", "disk", "times", "smaller", "f1"]
    assert first.split() == ["a", "12.000", "1.0", "0.5000"]
    assert second.split() == ["longer", "name", "0.500", "24.0"]
    assert {len(line) for line in (head, rule, first, second)} == {len(head)}


def test_weights_mb_counts_safetensors_files(tmp_path):
    names = ("model-1.safetensors", "model-2.safetensors", "2_Dense/model.safetensors")
    (tmp_path / "2_Dense").mkdir()  # a module of a SentenceTransformer
    for name, count in zip(names, (500, 250, 125), strict=True):
        save_file({"x": torch.zeros(count)}, tmp_path / name)
    (tmp_path / "optimizer.pt").write_bytes(bytes(9999))
    sizes = [(tmp_path / name).stat().st_size for name in names]
    assert weights_mb(tmp_path) == sum(sizes) / 1e6
    assert weights_mb(str(tmp_path)) > 3500 / 1e6


def test_folders_without_weights_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        weights_mb(tmp_path)
