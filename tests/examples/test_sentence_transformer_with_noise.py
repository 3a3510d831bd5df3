"""sentence_transformer_with_noise.py on a tiny BERT."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra 'sentence-transformers'")

import sentence_transformer_with_noise
from datasets import load_dataset
from sentence_transformer_with_noise import main
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import AutoModel, AutoTokenizer

from hf_quantnoise import IPQConfig, QuantNoiseCallback, QuantNoiseConfig, quantize_model
from hf_quantnoise.noise import find_state


@pytest.fixture
def pair_files(sentences, write):
    flags = []
    for flag, count, seed in (("train", 32, 0), ("validation", 16, 1)):
        texts, labels = sentences(2 * count, seed)
        same = [float(a == b) for a, b in zip(labels[::2], labels[1::2], strict=True)]
        columns = {"sentence1": texts[::2], "sentence2": texts[1::2], "score": same}
        flags += [f"--{flag}_file", write(f"{flag}.csv", columns)]
    return flags


@pytest.mark.parametrize("bf16", ["False", "True"])
def test_example_finetunes_compresses_and_reloads(bf16, tiny_model, pair_files, tmp_path, capsys):
    out = tmp_path / "out"
    rows = main([
        *("--model_name_or_path", tiny_model, *pair_files, "--output_dir", str(out)),
        *("--noise", "pq", "--noise_rate", "0.3", "--n_centroids", "8", "--codebook_update", "2"),
        *("--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "8"),
        *("--learning_rate", "1e-3", "--use_cpu", "--disable_tqdm", "True"),
        *("--report_to", "none", "--bf16", bf16),
    ])  # fmt: skip
    dense, _one_shot, small = rows
    assert small.megabytes < dense.megabytes
    assert all(-1 <= row.score <= 1 for row in rows)
    assert "Spearman" in capsys.readouterr().out
    assert QuantNoiseConfig.from_pretrained(out / "checkpoint-2").p == 0.3
    assert (out / "checkpoint-2" / "quant_noise_state.safetensors").is_file()
    plain = SentenceTransformer(str(out / "checkpoint-4"))[0].auto_model
    assert not getattr(plain, "is_quantized", False)
    assert SentenceTransformer(str(out / "compressed"))[0].auto_model.is_quantized


def write_pairs(write, **columns) -> list[str]:
    pairs = {"sentence1": ["a film", "a plot"], "sentence2": ["the film", "a cast"]}
    columns = {**columns, **pairs, "score": columns.get("score", [0.5, 0.0])}
    files = {flag: write(f"{flag}.csv", columns) for flag in ("train", "validation")}
    return [word for flag, path in files.items() for word in (f"--{flag}_file", path)]


def test_other_columns_are_not_trained_on(tiny_model, write, tmp_path, monkeypatch):
    """The trainer would take the first two columns that are not labels as the sentences."""
    found = []

    def trainer(*_, train_dataset, eval_dataset, **__):
        found.extend([train_dataset.column_names, eval_dataset.column_names])
        raise InterruptedError

    monkeypatch.setattr(sentence_transformer_with_noise, "SentenceTransformerTrainer", trainer)
    files = write_pairs(write, genre=["news", "forum"], label=[1, 0])
    with pytest.raises(InterruptedError):
        main(["--model_name_or_path", tiny_model, *files, "--output_dir", str(tmp_path / "out")])
    assert found == [["sentence1", "sentence2", "score"]] * 2


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        ([3.8, 0.0], "'score' from 0.0 to 3.8, expected -1 to 1"),
        ([None, 0.5], "1 of 2 rows with an empty column 'score'"),
        (["good", "bad"], "'score' of (large_)?string, expected values"),
    ],
)
def test_scores_that_no_cosine_can_have_are_an_error(score, reason, tiny_model, write, tmp_path):
    files = write_pairs(write, score=score)
    with pytest.raises(ValueError, match=rf"train\.csv.*{reason}"):
        main(["--model_name_or_path", tiny_model, *files, "--output_dir", str(tmp_path / "out")])


def test_missing_columns_are_named(tiny_model, write, tmp_path):
    files = [
        word
        for flag in ("train", "validation")
        for word in (f"--{flag}_file", write(f"{flag}.csv", {"text": ["a"], "score": [0]}))
    ]
    with pytest.raises(ValueError, match=r"train\.csv.* lacks the columns sentence1, sentence2"):
        main(["--model_name_or_path", tiny_model, *files, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/model", "no folder 'missing/model'"), ("packed", "is compressed already")],
)
def test_models_that_cannot_be_trained_are_an_error_before_training(
    name, reason, tiny_model, write, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = AutoModel.from_pretrained(tiny_model)
    quantize_model(model, IPQConfig(block_size=4, n_centroids=8), progress=False)
    model.save_pretrained("packed")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained("packed")
    words = ["--model_name_or_path", name, *write_pairs(write), "--output_dir", "out"]
    with pytest.raises(ValueError, match=f"invalid --model_name_or_path '{name}': .*{reason}"):
        main([*words, "--max_steps", "1", "--use_cpu", "--report_to", "none"])


def test_resumed_runs_are_bit_equal(tiny_model, pair_files, tmp_path):
    noise = QuantNoiseConfig(noise="pq", p=0.3, n_centroids=8)
    rows = load_dataset("csv", data_files=pair_files[1], split="train")

    def train(checkpoint=None):
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=6, save_steps=3, learning_rate=1e-3,
            per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        model = SentenceTransformer(tiny_model)
        SentenceTransformerTrainer(
            model, args, train_dataset=rows, loss=CosineSimilarityLoss(model),
            callbacks=[QuantNoiseCallback(noise)],
        ).train(resume_from_checkpoint=checkpoint)  # fmt: skip
        return dict(model.named_parameters()), find_state(model).state_dict()

    for one, other in zip(train(), train(str(tmp_path / "out" / "checkpoint-3")), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
