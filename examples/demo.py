#!/usr/bin/env python
"""The whole way on data that needs no download: train with noise, compress, save, load again.

A small vision transformer learns scikit-learn's handwritten digits (1797 images of 8 x 8 pixels)
while blocks of its weights are zeroed at random. Product quantization then takes it apart stage by
stage; what comes out is saved, loaded into a fresh model and compared with what went in. One to two
minutes.

    python examples/demo.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig, QuantNoiseTrainer
from hf_quantnoise.runs.closing_table import Row, closing_table, weights_mb

BLOCK_SIZE = {"ffn": 8, "attention": 4}


def load_data() -> tuple[list[dict], list[dict]]:
    """Training and test examples: pixels from -1 to 1, shape (1, 8, 8), and the digit."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    examples = [
        {"pixel_values": image, "labels": int(digit)}
        for image, digit in zip(pixels, digits.target, strict=True)
    ]
    return train_test_split(examples, test_size=360, stratify=digits.target, random_state=0)


def make_model() -> PreTrainedModel:
    """A ViT with random weights: 4 layers, hidden size 192, four patches; 7 MB in float32."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return ViTForImageClassification(config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the digits that are named right."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@torch.no_grad()
def logits(model: PreTrainedModel, examples: list[dict]) -> torch.Tensor:
    """The model's answers, shape (examples, 10)."""
    return model.eval()(torch.stack([example["pixel_values"] for example in examples])).logits


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The few things to play with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--epochs", type=float, default=15, help="of training with noise")
    parser.add_argument("--stage_epochs", type=float, default=2, help="of finetuning per stage")
    parser.add_argument("--p", type=float, default=0.1, help="share of the blocks that are noised")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Row]:
    """Runs the demo; returns the rows of its closing table.

    Raises:
        RuntimeError: if the model loaded from disk gives other logits than the one saved there.
    """
    options = parse_arguments(argv)
    set_seed(options.seed)
    train, test = load_data()
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        learning_rate=5e-4,
        warmup_steps=50,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=360,
        save_strategy="no",
        logging_strategy="no",
        seed=options.seed,
        use_cpu=True,
    )
    data = {"train_dataset": train, "eval_dataset": test, "compute_metrics": accuracy}

    print(f"1. Training with noise on {len(train)} digits")
    noise = QuantNoiseConfig(noise="proxy", p=options.p, block_size=BLOCK_SIZE)
    trainer = QuantNoiseTrainer(make_model(), arguments, noise, **data)
    trainer.train()
    dense_accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(options.output_dir / "dense")

    print("2. Compressing, stage by stage")
    target = IPQConfig(block_size=BLOCK_SIZE, stages=("ffn", "attention"), codebook_bits=16)
    small = trainer.compress(target, CompressionArguments(stage_epochs=options.stage_epochs))
    small.save_pretrained(options.output_dir / "compressed")

    print("3. Loading into a fresh model")
    fresh = AutoModelForImageClassification.from_pretrained(options.output_dir / "compressed")
    if not torch.equal(logits(small, test), logits(fresh, test)):
        raise RuntimeError("the model loaded from disk gives other logits than the one saved there")
    print(f"   its logits equal the saved model's bit for bit on {len(test)} held-out digits")
    small_accuracy = Trainer(fresh, arguments, **data).evaluate()["eval_accuracy"]

    rows = [
        Row("ViT, float32", weights_mb(options.output_dir / "dense"), dense_accuracy),
        Row("compressed, loaded", weights_mb(options.output_dir / "compressed"), small_accuracy),
    ]
    print(f"\n{closing_table(rows)}")
    return rows


if __name__ == "__main__":
    # More threads would wait for each other longer than such small matrices take, and with one the
    # figures do not depend on the number of cores.
    torch.set_num_threads(1)
    main()
