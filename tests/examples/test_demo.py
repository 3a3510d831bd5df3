"""A shortened run of the demo, and its output."""

import contextlib
import io
from functools import partial

import demo
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_quantnoise import CompressionArguments
from hf_quantnoise.runs.closing_table import Row, closing_table, weights_mb

WITHOUT_PLOTS = partial(CompressionArguments, plots=False)
SHORT = ["--epochs", "0.1", "--stage_epochs", "0.05"]  # a few steps of each


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A shortened demo: its folder, returned rows, printed text and compared logits."""
    folder, seen = tmp_path_factory.mktemp("demo"), []
    logits = demo.logits
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(demo, "CompressionArguments", WITHOUT_PLOTS)
        patch.setattr(demo, "logits", lambda *given: seen.append(logits(*given)) or seen[-1])
        rows = demo.main(["--output_dir", str(folder), *SHORT])
    return folder, rows, out.getvalue(), seen


def test_closing_table_has_the_sizes_of_the_files(run):
    folder, rows, printed, _ = run
    assert printed.endswith(f"\n\n{closing_table(rows)}\n")
    assert [row.megabytes for row in rows] == [
        weights_mb(folder / name) for name in ("dense", "compressed")
    ]
    assert rows[0].megabytes > 10 * rows[1].megabytes


def test_saved_model_has_the_logits_of_the_compressed_one(run):
    folder, _, printed, seen = run
    assert "bit-equal" in printed
    _, test = demo.load_data()
    fresh = AutoModelForImageClassification.from_pretrained(folder / "compressed")
    compressed, reloaded = seen
    assert compressed.shape == (len(test), 10)
    assert torch.equal(compressed, reloaded)
    assert torch.equal(compressed, demo.logits(fresh, test))


def test_closing_table_has_the_accuracy_of_the_saved_models(run):
    folder, rows, *_ = run
    _, test = demo.load_data()
    truth = torch.tensor([example["labels"] for example in test])
    for name, row in zip(("dense", "compressed"), rows, strict=True):
        model = AutoModelForImageClassification.from_pretrained(folder / name)
        right = (demo.logits(model, test).argmax(-1) == truth).sum().item()
        assert row.score == pytest.approx(right / len(test))


def test_different_logits_after_loading_are_an_error(monkeypatch, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    config = ViTConfig(**sizes, **image, intermediate_size=64)
    monkeypatch.setattr(demo, "CompressionArguments", WITHOUT_PLOTS)
    monkeypatch.setattr(demo, "make_model", lambda: ViTForImageClassification(config))
    answers = iter([torch.zeros(1), torch.ones(1)])
    monkeypatch.setattr(demo, "logits", lambda *_: next(answers))
    with pytest.raises(RuntimeError, match="other logits"):
        demo.main(["--output_dir", str(tmp_path), "--epochs", "0.05", "--stage_epochs", "0"])


def test_training_and_test_digits_are_a_partition():
    train, test = demo.load_data()
    assert (len(train), len(test)) == (1437, 360)
    everything = torch.stack([example["pixel_values"] for example in train + test])
    digits = torch.tensor(demo.load_digits().images, dtype=torch.float32) / 8 - 1
    assert everything.shape == (1797, 1, 8, 8)
    # Each digit once: both sides sorted as rows of pixels.
    assert sorted(everything.flatten(1).tolist()) == sorted(digits.flatten(1).tolist())


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
