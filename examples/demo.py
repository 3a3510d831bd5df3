#!/usr/bin/env python
"""Train a small model with noise, compress it, save it and load it again, without any download.

A small vision transformer is trained on scikit-learn's handwritten digits (1797 images of 8 x 8
pixels) with noise that sets random blocks of its weights to zero. It is then compressed in stages
by product quantization, saved, loaded and compared. Takes one to two minutes.

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
    """Return training and test examples: pixels from -1 to 1, shape (1, 8, 8), and the digit."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    examples = [
        {"pixel_values": image, "labels": int(digit)}
        for image, digit in zip(pixels, digits.target, strict=True)
    ]
    return train_test_split(examples, test_size=360, stratify=digits.target, random_state=0)


def make_model() -> PreTrainedModel:
    """Return a ViT with random weights: 4 layers, hidden size 192, 4 patches; 7 MB in float32."""
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
    """Return the accuracy of the predictions."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@torch.no_grad()
def logits(model: PreTrainedModel, examples: list[dict]) -> torch.Tensor:
    """Return the logits, shape (examples, 10)."""
    return model.eval()(torch.stack([example["pixel_values"] for example in examples])).logits


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--epochs", type=float, default=15, help="epochs of training with noise")
    parser.add_argument("--stage_epochs", type=float, default=2, help="epochs per stage")
    parser.add_argument("--p", type=float, default=0.1, help="noise rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the demo; return the rows of its closing table.

    Raises:
        RuntimeError: if the loaded model has other logits than the saved one.
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

    print("2. Compressing in stages")
    target = IPQConfig(block_size=BLOCK_SIZE, stages=("ffn", "attention"), codebook_bits=16)
    small = trainer.compress(target, CompressionArguments(stage_epochs=options.stage_epochs))
    small.save_pretrained(options.output_dir / "compressed")

    print("3. Loading the compressed model")
    fresh = AutoModelForImageClassification.from_pretrained(options.output_dir / "compressed")
    if not torch.equal(logits(small, test), logits(fresh, test)):
        raise RuntimeError("the loaded model has other logits than the saved one")
    print(f"   its logits are bit-equal to the saved model's on {len(test)} test digits")
    small_accuracy = Trainer(fresh, arguments, **data).evaluate()["eval_accuracy"]

    rows = [
        Row("ViT, float32", weights_mb(options.output_dir / "dense"), dense_accuracy),
        Row("compressed, loaded", weights_mb(options.output_dir / "compressed"), small_accuracy),
    ]
    print(f"\n{closing_table(rows)}")
    return rows


if __name__ == "__main__":
    # Faster for such small matrices, and the results do not depend on the number of cores.
    torch.set_num_threads(1)
    main()
