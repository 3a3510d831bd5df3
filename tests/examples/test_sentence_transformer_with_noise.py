"""sentence_transformer_with_noise.py on a tiny BERT."""

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra 'sentence-transformers'")

from datasets import load_dataset
from sentence_transformer_with_noise import main
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

from hf_quantnoise import QuantNoiseCallback, QuantNoiseConfig
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
