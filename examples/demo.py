#!/usr/bin/env python
"""Compress a small model with and without noise, and compare the results, without any download.

A small vision transformer is trained on scikit-learn's handwritten digits (1797 images of 8 x 8
pixels) and compressed in four ways, all to the same size: with and without quantization noise, in
one shot and finetuned afterwards. Each model is saved, loaded again and scored. The run ends with a
table and a picture, and takes one to two minutes.

    python examples/demo.py
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    quantize_model,
)
from hf_quantnoise.runs.closing_table import Row, closing_table, weights_mb

# Blocks of 8 weights and 16 centroids: half a bit per weight.
TARGET = partial(IPQConfig, block_size={"ffn": 8, "attention": 8}, n_centroids=16, stages=[".*"])
METRICS = ("accuracy", "loss")


@dataclass(frozen=True)
class Rates:
    """Learning rates, chosen by benchmarks/demo_rates.py on training digits that were held out."""

    weights: float
    centroids: float


NOISE, FINETUNING = Rates(1e-3, 2e-3), Rates(2e-4, 2e-3)


def load_data(held_out: bool = False) -> tuple[list[dict], list[dict]]:
    """Return two sets of digits: pixels from -1 to 1, shape (1, 8, 8), and the label.

    The sets are 1437 digits for training and 360 for the test; with ``held_out``, 1150 and 287 of
    those for training, so that settings can be chosen without the test digits.
    """
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    examples = [
        {"pixel_values": image, "labels": int(digit)}
        for image, digit in zip(pixels, digits.target, strict=True)
    ]

    def split(rows: list[dict], count: int) -> tuple[list[dict], list[dict]]:
        labels = [row["labels"] for row in rows]
        return train_test_split(rows, test_size=count, stratify=labels, random_state=0)

    train, test = split(examples, 360)
    return split(train, 287) if held_out else (train, test)


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


class Demo:
    """The trainings: of the float32 model, and from it to each compressed one.

    Args:
        options: of the command line.
        train: training digits.
        test: digits to score the models on.
    """

    def __init__(self, options: argparse.Namespace, train: list[dict], test: list[dict]) -> None:
        self.options = options
        self.data = {"train_dataset": train, "eval_dataset": test, "compute_metrics": accuracy}

    def arguments(self, epochs: float, learning_rate: float) -> TrainingArguments:
        """Return the arguments of a training."""
        return TrainingArguments(
            output_dir=self.options.output_dir / "runs",
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            warmup_steps=20,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=360,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
            seed=self.options.seed,
            use_cpu=True,
        )

    def trainer(self, kind: type[Trainer], *args: Any, **kwargs: Any) -> Trainer:
        """Return a trainer on the data that prints no logs."""
        trainer = kind(*args, **self.data, **kwargs)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def float32(self) -> PreTrainedModel:
        """Train the float32 model."""
        set_seed(self.options.seed)
        trainer = self.trainer(Trainer, make_model(), self.arguments(self.options.epochs, 5e-4))
        trainer.train()
        return trainer.model

    def one_shot(self, dense: PreTrainedModel) -> PreTrainedModel:
        """Compress without any training."""
        return quantize_model(copy.deepcopy(dense), TARGET())

    def finetuned(self, dense: PreTrainedModel, rates: Rates = FINETUNING) -> PreTrainedModel:
        """Compress, then train the centroids and what is not packed; the teacher is ``dense``."""
        arguments = self.arguments(1, rates.weights)
        trainer = self.trainer(QuantNoiseTrainer, copy.deepcopy(dense), arguments)
        return trainer.compress(TARGET(), self.stage(1.0, rates))

    def with_noise(
        self, dense: PreTrainedModel, share: float = 1.0, rates: Rates = NOISE
    ) -> PreTrainedModel:
        """Train with exact PQ noise of rate 1, whose centroids are trained too, then compress.

        Args:
            dense: where to start, and the teacher.
            share: of the training that has noise; the rest is :meth:`finetuned`.
            rates: of the training with noise.
        """
        model = copy.deepcopy(dense)
        noise = QuantNoiseConfig.matching(TARGET(), model, noise="pq", p=1.0, learn_codebooks=True)
        trainer = self.trainer(
            QuantNoiseTrainer,
            model,
            self.arguments(share * self.options.compression_epochs, rates.weights),
            noise,
            teacher=dense,
            compression_args=CompressionArguments(codebook_learning_rate=rates.centroids),
        )
        trainer.train()
        return trainer.compress(TARGET(), self.stage(1 - share, FINETUNING))

    def stage(self, share: float, rates: Rates) -> CompressionArguments:
        """Return the settings of a training after packing; ``share`` is that of all epochs."""
        return CompressionArguments(
            stage_epochs=share * self.options.compression_epochs,
            stage_learning_rate=rates.weights,
            codebook_learning_rate=rates.centroids,
            plots=False,
        )

    def scores(self, model: PreTrainedModel) -> list[float]:
        """Return the metrics on the test digits."""
        values = self.trainer(Trainer, model, self.arguments(1, 1e-4)).evaluate()
        return [values[f"eval_{name}"] for name in METRICS]


def saved_and_scored(demo: Demo, name: str, model: PreTrainedModel) -> Row:
    """Save a model, load it again and return its row.

    Raises:
        RuntimeError: if the loaded model has other logits than the saved one.
    """
    folder = demo.options.output_dir / name.replace(",", "").replace(" ", "_")
    model.save_pretrained(folder)
    fresh = AutoModelForImageClassification.from_pretrained(folder)
    test = demo.data["eval_dataset"]
    if not torch.equal(logits(model, test), logits(fresh, test)):
        raise RuntimeError(f"the model loaded from {folder} has other logits than the saved one")
    score, *more = demo.scores(fresh)
    return Row(name, weights_mb(folder), score, tuple(more))


def write_picture(rows: list[Row], path: Path) -> None:
    """Draw accuracy and loss of the models against their size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for index, axes in enumerate(figure.subplots(1, 2)):
        scores = [(row.score, *row.more)[index] for row in rows]
        axes.axhline(scores[0], color="0.6", linestyle="--", zorder=0)
        # Open marks of growing size: several models may have the same score.
        for size, (row, score, mark) in enumerate(zip(rows, scores, "osv^D", strict=True), 6):
            axes.plot(row.megabytes, score, mark, ms=size, mew=2, mfc="none", label=row.model)
        axes.set(xscale="log", xlabel="MB on disk", ylabel=f"{METRICS[index]} on the test digits")
        axes.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(loc="center")
    figure.savefig(path, dpi=120)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--epochs", type=float, default=15, help="epochs of the float32 model")
    parser.add_argument(
        "--compression_epochs", type=float, default=6, help="epochs for each compressed model"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the demo; return the rows of its closing table."""
    options = parse_arguments(argv)
    train, test = load_data()
    demo = Demo(options, train, test)
    print(f"Training a float32 ViT on {len(train)} digits ...", flush=True)
    dense = demo.float32()
    rows = [saved_and_scored(demo, "float32", dense)]
    ways: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
        "no noise, one shot": demo.one_shot,
        "no noise, finetuned": demo.finetuned,
        "noise, one shot": demo.with_noise,
        "noise, finetuned": partial(demo.with_noise, share=0.5),
    }
    for name, way in ways.items():
        start = time.perf_counter()
        print(f"Compressing: {name} ...", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):  # the table has the figures of the stages
            model = way(dense)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        rows.append(saved_and_scored(demo, name, model))
    print(f"\n{closing_table(rows, *METRICS)}\n")
    print(
        f"Scores: of the models loaded from disk, on {len(test)} test digits; their logits are\n"
        "bit-equal to those of the models that were saved. Training of each compressed model: "
        f"{options.compression_epochs:g} epochs,\nnone for the first."
    )
    picture = options.output_dir / "accuracy.png"
    write_picture(rows, picture)
    print(f"Picture: {picture.resolve()}")
    return rows


if __name__ == "__main__":
    # Faster for such small matrices, and the results do not depend on the number of cores.
    torch.set_num_threads(1)
    main()
