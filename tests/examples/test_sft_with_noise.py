"""sft_with_noise.py on a tiny model: noise as a callback of TRL's SFTTrainer.

TRL's default precision, mixed with bfloat16, is used everywhere.
"""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra 'trl'")

import sft_with_noise
from datasets import load_dataset
from sft_with_noise import logits, main
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_quantnoise import IPQConfig, QuantNoiseCallback, QuantNoiseConfig, quantize_model
from hf_quantnoise.noise import find_state

SPLITS = ("train", "validation")


@pytest.fixture
def files(texts, tmp_path):
    """The text files' lines as rows."""
    flags = []
    for split, path in texts.items():
        rows = [json.dumps({"text": line.strip()}) for line in path.read_text().splitlines()]
        target = tmp_path / f"{split}.jsonl"
        target.write_text("\n".join(rows[:32]) + "\n")
        flags += [f"--{split}_file", str(target)]
    return flags


def test_example_finetunes_compresses_and_reloads(text_checkpoint, files, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    rows = main([
        *("--model_name_or_path", str(text_checkpoint), *files, "--output_dir", str(out)),
        *("--noise", "pq", "--noise_rate", "0.3", "--n_centroids", "8", "--codebook_update", "2"),
        *("--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "8"),
        *("--learning_rate", "1e-3", "--max_length", "16"),
        *("--disable_tqdm", "True", "--report_to", "none"),
    ])  # fmt: skip
    dense, one_shot, small = rows
    assert small.megabytes < dense.megabytes
    assert small.score != one_shot.score  # the centroids moved
    assert "loss per token" in capsys.readouterr().out
    # TRL's fused loss uses the weight of the head directly.
    assert "lm_head" in caplog.text
    # Checkpoints of the noise phase are regular models; the state of the noise is in another file.
    assert QuantNoiseConfig.from_pretrained(out / "checkpoint-2").p == 0.3
    assert (out / "checkpoint-2" / "quant_noise_state.safetensors").is_file()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        out / "checkpoint-4", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not getattr(loaded, "is_quantized", False)
    assert AutoModelForCausalLM.from_pretrained(out / "compressed").is_quantized


def packed(path, out):
    """Write a packed model with its tokenizer; return the folder."""
    model = AutoModelForCausalLM.from_pretrained(path)
    quantize_model(model, IPQConfig(block_size=4, n_centroids=8), progress=False)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(path).save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no folder 'missing/model'"),
        ("packed", "is compressed already.*--to dense"),
        ("wordless", "its tokenizer cannot be loaded"),
    ],
)
def test_models_that_cannot_be_trained_are_an_error_before_training(
    kind, reason, text_checkpoint, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(sft_with_noise, "SFTTrainer", lambda *_, **__: pytest.fail("it trains"))
    if kind == "wordless":
        AutoModelForCausalLM.from_pretrained(text_checkpoint).save_pretrained(tmp_path / kind)
    paths = {"missing": "missing/model", "wordless": tmp_path / "wordless"}
    name = str(paths.get(kind) or packed(text_checkpoint, tmp_path / "packed"))
    words = ["--model_name_or_path", name, *files, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"invalid --model_name_or_path '{name}': .*{reason}"):
        main([*words, "--noise", "none"])


def test_columns_that_the_trainer_does_not_know_are_named(text_checkpoint, write, tmp_path):
    files = [f"--{s}_file={write(f'{s}.jsonl', {'sentence': ['w1']})}" for s in SPLITS]
    words = ["--model_name_or_path", str(text_checkpoint), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"train\.jsonl has the columns sentence, expected text"):
        main([*words, *files])


class OnGpu:
    """A model on a GPU."""

    device, config = "cuda", SimpleNamespace(vocab_size=8)

    def cpu(self):
        self.device = "cpu"
        return self

    def eval(self):
        return self

    def forward(self, input_ids):
        return SimpleNamespace(logits=input_ids.to(self.device))


def test_logits_are_those_on_the_cpu():
    """The saved model is where it was trained, the loaded one on the CPU."""
    assert torch.equal(logits(OnGpu()), torch.arange(8)[None])


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_runs_are_bit_equal(tied, text_checkpoint, files, tmp_path, caplog):
    """The checkpoint is within an epoch, so its codebooks were fitted to earlier weights."""
    noise = QuantNoiseConfig(noise=["pq", "int8"], p=0.3, n_centroids=8, scale_update_steps=2)
    rows = load_dataset("json", data_files=files[1], split="train")

    def train(checkpoint=None):
        args = SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=6, save_steps=3, max_length=16,
            per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(text_checkpoint, tie_word_embeddings=tied)
        SFTTrainer(
            model, args, train_dataset=rows, callbacks=[QuantNoiseCallback(noise)],
            processing_class=AutoTokenizer.from_pretrained(text_checkpoint),
        ).train(resume_from_checkpoint=checkpoint)  # fmt: skip
        return dict(model.named_parameters()), find_state(model).state_dict()

    complete = train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    resumed = train(str(checkpoint))
    for one, other in zip(complete, resumed, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    # The weight of the head is used directly, whether it is tied or not.
    assert sum("noise on lm_head" in r.getMessage() for r in caplog.records) == 2
    # Without the state of the noise the result differs.
    (checkpoint / "quant_noise_state.safetensors").unlink()
    other, _ = train(str(checkpoint))
    assert any(not torch.equal(tensor, other[name]) for name, tensor in complete[0].items())
