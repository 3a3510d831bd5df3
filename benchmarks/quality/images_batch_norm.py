#!/usr/bin/env python
"""How many images BatchNorm needs: the float32 model of ``images_float32.py`` on held-out images.

    python benchmarks/quality/images_batch_norm.py --data_dir ../shared/data/cifar10

First the float32 model; its row 0 keeps the statistics of the training, with the momentum that
transformers sets. Then int8 and int4 in one shot, from the float32 model with statistics of 64
batches, which are kept, replaced by those of some images, or changed as by ``quantize_model``.
Finished rows are skipped.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import cifar10
import torch
from results_file import append_line, line_of
from transformers import HfArgumentParser

from hf_quantnoise import FixedPointConfig, quantize_model, update_bn_stats

BATCHES = (0, 1, 4, 16, 64)
BATCH_SIZE = 64
PACKED = [
    {"bits": bits, "statistics": statistics, "images": images}
    for bits in (8, 4)
    for statistics in ("kept", "replaced", "changed")
    for images in ((8, 64, 256) if statistics != "kept" else (0,))
]


@dataclass
class Arguments:
    """Files and folders."""

    data_dir: str = field(metadata={"help": "Folder with train.parquet and test.parquet."})
    results: str = field(
        default="benchmarks/results/quality_images_batch_norm.jsonl",
        metadata={"help": "One line per number of batches."},
    )
    work_dir: str = field(
        default="benchmarks/runs/images", metadata={"help": "Folder of the float32 model."}
    )


def load_model(args: Arguments, data: cifar10.Images, images: int):
    """Return the float32 model with statistics of the first training images, in random order."""
    model = cifar10.load_model(os.path.join(args.work_dir, "float32"))
    return update_bn_stats(model, batches_of(data, images)) if images else model


def batches_of(data: cifar10.Images, images: int) -> list[dict]:
    """Return batches of random images."""
    torch.manual_seed(0)
    rows = [data[row] for row in torch.randperm(len(data))[:images].tolist()]
    return [
        cifar10.collate(rows[start : start + BATCH_SIZE]) for start in range(0, images, BATCH_SIZE)
    ]


def pack(model, data: cifar10.Images, bits: int, statistics: str, images: int):
    """Return the model in N bits, with the statistics that a row asks for."""
    batches = batches_of(data, images)
    config = FixedPointConfig(bits=bits, observer="channel")
    data_for_it = batches if statistics == "changed" else None
    small = quantize_model(model, config, progress=False, calibration_data=data_for_it)
    return update_bn_stats(small, batches) if statistics == "replaced" else small


def main() -> None:
    """Run what is missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    splits = cifar10.load(args.data_dir, args.work_dir)
    for setting in [{"batches": number} for number in BATCHES] + PACKED:
        key = {"study": "images_batch_norm", **setting, "batch": BATCH_SIZE, "seed": 0}
        if line_of(args.results, key):
            continue
        model = load_model(args, splits.train, BATCH_SIZE * setting.get("batches", 64))
        if "bits" in setting:
            model = pack(model, splits.train, **setting)
        found = cifar10.scores(cifar10.logits_of(model, splits.held_out), splits.held_out.labels)
        append_line(args.results, key, {"held_out": found})
        print(setting, found, flush=True)


if __name__ == "__main__":
    main()
