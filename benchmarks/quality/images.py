#!/usr/bin/env python
"""Image study: MobileNetV1 on CIFAR-10, compressed with and without noise in the same steps.

    python benchmarks/quality/images.py --data_dir ../shared/data/cifar10

Each row begins with the float32 model of ``images_float32.py``, which is also the teacher of the
epochs with noise and of the stages. Each finished run appends one line to the results; runs that
are there are skipped.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import torch
import torch.nn.functional as F
from images_float32 import training_arguments
from results_file import append_line, line_of
from transformers import AutoModelForImageClassification, HfArgumentParser

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    update_bn_stats,
)

# The first and the second half of the network, then the classifier.
HALVES = [
    r"mobilenet_v1\.(conv_stem|layer\.(\d|1[0-5])\.).*",
    r"mobilenet_v1\.layer\.(1[6-9]|2\d)\..*",
    "head",
]
DEPTHWISE = r"mobilenet_v1\.layer\.\d*[02468]\..*"
BATCH_NORM_BATCHES = 32  # for the statistics of the float32 model
STORED = {"block_size": 4, "n_centroids": 256}
EPOCHS = 8.0  # of all arms of a size, with 8,000 images: 1,000 steps


def product(noise: dict | None, stages: list[str], noise_epochs: float) -> dict:
    """Return epochs with noise, then the rest of the epochs, shared by the stages."""
    return {
        "noise": noise,
        "noise_epochs": noise_epochs,
        "config": {**STORED, "stages": stages},
        "stage_epochs": (EPOCHS - noise_epochs) / len(stages),
        "codebook_learning_rate": 1e-3,
    }


def fixed_point(bits: int, p: float) -> dict:
    """Return epochs with noise, then one-shot quantization; p = 1 is QAT."""
    return {
        "noise": {"p": p} if p else None,
        "noise_epochs": 2.0 if p else 0.0,
        "config": {"bits": bits, "observer": "channel"},
        "stage_epochs": 0.0,
    }


PROXY, EXACT = {"noise": "proxy", "p": 0.1}, {"noise": "pq", "p": 0.3}
TRAINED = {"noise": "pq", "p": 1.0, "learn_codebooks": True, "codebook_update": 1}
JOINT = [".*"]
METHODS = {
    "float32": (None, {}),
    "no noise": ("10x", product(None, JOINT, 0)),
    "trained noise": ("10x", product(TRAINED, JOINT, EPOCHS)),
    "exact noise": ("10x", product(EXACT, JOINT, EPOCHS / 2)),
    "proxy noise": ("10x", product(PROXY, JOINT, EPOCHS / 2)),
    "staged, no noise": ("10x", product(None, HALVES, 0)),
    "staged, exact noise": ("10x", product(EXACT, HALVES, EPOCHS / 2)),
    "proxy noise, not depthwise": (
        "10x", product({**PROXY, "exclude_modules": DEPTHWISE}, JOINT, EPOCHS / 2)
    ),
    "int4 after training": ("int4", fixed_point(4, 0.0)),
    "int4 QAT": ("int4", fixed_point(4, 1.0)),
    "int4 noise": ("int4", fixed_point(4, 0.5)),
    "int8 after training": ("int8", fixed_point(8, 0.0)),
    "int8 QAT": ("int8", fixed_point(8, 1.0)),
    "int8 noise": ("int8", fixed_point(8, 0.5)),
}  # fmt: skip


@dataclass
class Arguments:
    """Selection of runs, and folders."""

    data_dir: str = field(metadata={"help": "Folder with train.parquet and test.parquet."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "Only these methods."}
    )
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "Seeds."})
    images: int = field(default=8000, metadata={"help": "Number of training images."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of all phases."})
    results: str = field(
        default="benchmarks/results/quality_images.jsonl", metadata={"help": "One line per run."}
    )
    work_dir: str = field(
        default="benchmarks/runs/images", metadata={"help": "Folder of the float32 model."}
    )


def load_start(args: Arguments, train: cifar10.Images) -> torch.nn.Module:
    """Return the float32 model, with BatchNorm statistics of training batches.

    The momentum of transformers' MobileNetV1, 0.9997, keeps those of the last batch only.
    """
    model = cifar10.load_model(os.path.join(args.work_dir, "float32"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = [train[row] for row in range(BATCH_NORM_BATCHES * 64)]
        batches = [cifar10.collate(rows[start : start + 64]) for start in range(0, len(rows), 64)]
    return update_bn_stats(model, batches).eval()


def compress(args: Arguments, key: dict, model, teacher, train: cifar10.Images) -> tuple:
    """Return the compressed model, loaded from its file, with the bytes of the file and steps."""
    setting, seed = key["setting"], key["seed"]
    kind = IPQConfig if "stages" in setting["config"] else FixedPointConfig
    config, noise = kind(**setting["config"]), setting["noise"]
    if noise is not None:
        noise = QuantNoiseConfig.matching(config, model, **noise)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = QuantNoiseTrainer(
            model,
            training_arguments(folder, seed, args.learning_rate, setting["noise_epochs"]),
            noise,
            teacher=teacher,
            compression_args=CompressionArguments(
                stage_epochs=setting["stage_epochs"], plots=False,
                codebook_learning_rate=setting.get("codebook_learning_rate"),
            ),
            train_dataset=train,
            data_collator=cifar10.collate,
        )  # fmt: skip
        if setting["noise_epochs"]:
            trainer.train()
        small = trainer.compress(config)
        steps = trainer.compression_history[-1]["step"]
        small.to(memory_format=torch.contiguous_format).save_pretrained(folder)
        size = os.path.getsize(os.path.join(folder, "model.safetensors"))
        return AutoModelForImageClassification.from_pretrained(folder), size, steps


def run(args: Arguments, key: dict, splits: cifar10.Splits) -> dict:
    """Compress one model; return its figures."""
    start = load_start(args, splits.train)
    teacher = copy.deepcopy(start)
    begun = time.monotonic()
    float32 = os.path.getsize(os.path.join(args.work_dir, "float32", "model.safetensors"))
    small, size, steps = start, float32, 0
    if key["size"] is not None:
        small, size, steps = compress(args, key, start, teacher, splits.train)
    figures = {"seconds": time.monotonic() - begun, "steps": steps, "bytes": size,
               "float32_bytes": float32}  # fmt: skip
    for name, split in {"held_out": splits.held_out, "dev": splits.test}.items():
        expected, logits = (cifar10.logits_of(each, split) for each in (teacher, small))
        log_p, log_q = F.log_softmax(expected, -1), F.log_softmax(logits, -1)
        figures[name] = cifar10.scores(logits, split.labels) | {
            "divergence": F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item(),
            "agreement": (expected.argmax(-1) == logits.argmax(-1)).float().mean().item(),
        }
        figures[f"{name}_float32"] = cifar10.scores(expected, split.labels)
    correct = (logits.argmax(-1) == splits.test.labels).int().tolist()
    figures["dev_correct"] = "".join(map(str, correct))
    return figures


def main() -> None:
    """Run what is missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    splits = cifar10.load(args.data_dir, args.work_dir, args.images)
    for seed in args.seeds:
        for method in args.methods:
            size, setting = METHODS[method]
            common = {"images": args.images, "learning_rate": args.learning_rate}
            if size is None:
                common = {"batch_norm_batches": BATCH_NORM_BATCHES}
            key = {
                "study": "images", "task": "cifar10", "model": "mobilenet_v1_0.75",
                "method": method, "size": size, "seed": seed, "setting": {**common, **setting},
            }  # fmt: skip
            if line_of(args.results, key):
                continue
            figures = run(args, key, splits)
            append_line(args.results, key, figures)
            short = {name: value for name, value in figures.items() if name != "dev_correct"}
            print(method, seed, short, flush=True)


if __name__ == "__main__":
    main()
