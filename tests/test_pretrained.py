"""The main job on real pretrained weights, if they are there: train with noise, compress, reload.

The folder is that of ``HF_QUANTNOISE_SHARED``, or ``shared`` beside the repository.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    size_report,
)

FOLDER = Path(os.environ.get("HF_QUANTNOISE_SHARED", Path(__file__).parents[2] / "shared"))
STORY = "Once upon a time, there was a little dog named Tim. Tim liked to play in the park. " * 12
SENTENCES = ["a moving film", "a dull plot and bad acting", "one of the best of the year"]

# Writes the logits of a model that another process saved.
RELOAD = """
import sys, torch
import hf_quantnoise
from safetensors.torch import load_file, save_file
model = hf_quantnoise.AutoQuantizedModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(**load_file(sys.argv[2])).logits
save_file({"logits": logits}, sys.argv[3])
"""


def checkpoint(name: str) -> Path:
    """Return the folder of a pretrained model; skip the test if it is not there."""
    folder = FOLDER / "models" / name
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no pretrained model in {folder}; set HF_QUANTNOISE_SHARED")
    return folder


def language_model():
    """Return a pretrained Llama of 0.26 M parameters, texts, their collator, and a batch."""
    folder = checkpoint("stories260K")
    ids = AutoTokenizer.from_pretrained(folder)(STORY)["input_ids"]
    rows = [{"input_ids": ids[i : i + 64], "labels": ids[i : i + 64]} for i in range(0, 256, 64)]
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, rows, default_data_collator, batch


def encoder():
    """Return a pretrained MiniLM of 22.7 M parameters with a new head, and the same."""
    folder = checkpoint("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{**tokenizer(text), "labels": index % 2} for index, text in enumerate(SENTENCES)]
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model, rows, DataCollatorWithPadding(tokenizer), batch


@pytest.mark.parametrize(("make", "steps"), [(language_model, 10), (encoder, 2)])
def test_pretrained_model_is_trained_with_noise_packed_and_reloaded(
    make, steps, tmp_path, run_python
):
    model, rows, collator, batch = make()
    dense = copy.deepcopy(model).eval()
    # Few centroids, for a quick k-means.
    target = IPQConfig(block_size=4, n_centroids=16, stages=[".*"])
    noise = QuantNoiseConfig.matching(target, model, noise="pq", p=1.0, learn_codebooks=True)
    args = TrainingArguments(
        tmp_path / "runs", max_steps=steps, learning_rate=1e-3, save_strategy="no", use_cpu=True
    )
    trainer = QuantNoiseTrainer(
        model,
        args,
        noise,
        teacher=copy.deepcopy(dense),
        compression_args=CompressionArguments(stage_epochs=0, plots=False),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    small = trainer.compress(target).eval()
    with torch.no_grad():
        kept, before = small(**batch).logits, dense(**batch).logits
    assert kept.isfinite().all() and not torch.equal(kept, before)

    small.save_pretrained(tmp_path / "small")
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert 15 * size < 4 * dense.num_parameters()
    assert size == pytest.approx(size_report(small).total.disk_bytes, rel=0.01)
    batch_file, answer = tmp_path / "batch.safetensors", tmp_path / "logits.safetensors"
    save_file(batch, batch_file)
    run_python(RELOAD, str(tmp_path / "small"), str(batch_file), str(answer))
    assert torch.equal(load_file(answer)["logits"], kept)
