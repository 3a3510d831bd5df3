#!/usr/bin/env python
"""Float32 baselines of the image study: MobileNetV1 (ImageNet) finetuned on CIFAR-10.

    python benchmarks/quality/images_float32.py --data_dir ../shared/data/cifar10 \\
      --model_dir ../shared/models/mobilenet_v1_0.75_224

The learning rate is chosen on held-out training images in short runs; one long run follows. Each
finished run appends one line to the results; runs that are already there are skipped. The long run
is repeated if its model is missing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, field

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import torch
from results_file import append_or_compare, line_of, read_lines
from transformers import HfArgumentParser, Trainer, TrainingArguments

# transformers creates MobileNetV1 with a BatchNorm momentum that keeps the last batch only.
# images.py measures the statistics again before it uses the model.
METHOD = "float32, statistics of the last batch"
RATES = (5e-4, 1e-3, 2e-3)
SHORT, LONG = 2, 8  # epochs


@dataclass
class Arguments:
    """Files and folders."""

    data_dir: str = field(metadata={"help": "Folder with train.parquet and test.parquet."})
    model_dir: str = field(metadata={"help": "Pretrained checkpoint."})
    seed: int = field(default=42, metadata={"help": "Seed of all runs."})
    results: str = field(
        default="benchmarks/results/quality_images.jsonl", metadata={"help": "One line per run."}
    )
    work_dir: str = field(
        default="benchmarks/runs/images", metadata={"help": "Folder of the finetuned model."}
    )


def training_arguments(folder: str, seed: int, rate: float, epochs: float) -> TrainingArguments:
    """Return the settings that all runs of the study share."""
    return TrainingArguments(
        output_dir=folder, seed=seed, learning_rate=rate, num_train_epochs=epochs,
        per_device_train_batch_size=64, warmup_steps=0.1, lr_scheduler_type="cosine",
        weight_decay=0.01, use_cpu=True, save_strategy="no", logging_steps=200,
        disable_tqdm=True, report_to="none", remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip


def key_of(seed: int, rate: float, epochs: int) -> dict:
    """Return what identifies a run."""
    setting = {"learning_rate": rate, "epochs": epochs, "pixels": cifar10.PIXELS, "batch": 64}
    return {
        "study": "images", "task": "cifar10", "model": "mobilenet_v1_0.75", "method": METHOD,
        "size": None, "seed": seed, "setting": setting,
    }  # fmt: skip


def finetune(args: Arguments, key: dict, splits: cifar10.Splits) -> None:
    """Train one model and append its row, if it has none; the long run saves the model."""
    setting = key["setting"]
    torch.manual_seed(key["seed"])
    model = cifar10.load_model(args.model_dir)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        training = training_arguments(
            folder, key["seed"], setting["learning_rate"], setting["epochs"]
        )
        trainer = Trainer(
            model, training, train_dataset=splits.train, data_collator=cifar10.collate
        )
        trainer.train()
    model = model.to(memory_format=torch.contiguous_format)
    figures = {"seconds": time.monotonic() - begun, "steps": trainer.state.global_step}
    final = setting["epochs"] == LONG
    folder = os.path.join(args.work_dir, "float32") if final else tempfile.mkdtemp()
    model.save_pretrained(folder)
    figures["bytes"] = os.path.getsize(os.path.join(folder, "model.safetensors"))
    figures["float32_bytes"] = figures["bytes"]
    for name, split in {"held_out": splits.held_out, "dev": splits.test}.items():
        if name == "held_out" or final:  # settings are chosen on held-out images alone
            figures[name] = cifar10.scores(cifar10.logits_of(model, split), split.labels)
    append_or_compare(args.results, key, figures)
    print(setting, figures, flush=True)


def main() -> None:
    """Run what is missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    splits = cifar10.load(args.data_dir, args.work_dir)
    keys = [key_of(args.seed, rate, SHORT) for rate in RATES]

    def rows() -> list[dict]:
        return [row for row in read_lines(args.results) if row["key"] in keys]

    for key in keys:
        if line_of(args.results, key) is None:
            finetune(args, key, splits)
    best = min(rows(), key=lambda row: row["held_out"]["loss"])
    final = key_of(args.seed, best["key"]["setting"]["learning_rate"], LONG)
    is_missing = not os.path.isdir(os.path.join(args.work_dir, "float32"))
    if is_missing or line_of(args.results, final) is None:
        finetune(args, final, splits)


if __name__ == "__main__":
    main()
