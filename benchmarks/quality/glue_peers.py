#!/usr/bin/env python
"""Other libraries on GLUE: post-training quantization of the float32 models, without training.

    pip install torchao==0.18.0 optimum-quanto==0.2.7
    python benchmarks/quality/glue_peers.py --data_dir ../shared/data --seeds 42 43 44

Each row begins with the float32 model that ``glue_float32.py`` trained with the same seed. It is
quantized by torchao, by optimum-quanto, or by this package in one shot, saved, loaded and evaluated
as in ``glue_compress.py``. The other libraries are not dependencies of this package; ``--methods``
selects rows that do not need them. Each finished row appends one line; rows that are there are
skipped.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import glue
import peer_libraries
import torch
from datasets import Dataset
from glue_compress import (
    Selection,
    figures_of_logits,
    run_missing,
    start_of,
    storage_of,
    weight_bytes,
)
from glue_studies import ALLOCATED, STORAGE
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
)

from hf_quantnoise import FixedPointConfig, quantize_model

STUDY = "glue_peers"
TORCHAO, QUANTO = "torchao (Linear, embeddings)", "quanto (Linear)"
INTN = "intN after training"
# Two codebooks with blocks of twice the length: as many bits per weight as one.
TWO_CODEBOOKS = {
    "13x": {"block_size": 8, "n_codebooks": 2},
    "20x": {"block_size": 8, "n_codebooks": 2, "frequent_rows": 8000, "rare_block_size": 32},
}


def _torchao(bits: int, group: int | None, algorithm: str) -> tuple[str, str, dict]:
    size = f"int{bits}, groups of {group}" if group else f"int{bits}"
    options = {"bits": bits, "group": group, "algorithm": algorithm}
    return size, TORCHAO, {"library": "torchao", **options}


def _quanto(bits: int) -> tuple[str, str, dict]:
    size = f"int{bits}" if bits == 8 else f"int{bits}, groups of 128"
    return size, QUANTO, {"library": "quanto", "weights": f"qint{bits}"}


def _own(size: str, method: str, scheme: str, config: dict) -> tuple[str, str, dict]:
    return size, method, {"library": "hf_quantnoise", "scheme": scheme, "config": config}


# (size, method, setting) of each row. 8x has the bits per weight of int4. The algorithms of torchao
# and quanto are those with the smaller divergence on held-out examples of SST-2.
METHODS = [
    _torchao(2, 128, "hqq"),
    _torchao(2, 32, "asymmetric"),
    _torchao(4, 32, "asymmetric"),
    _quanto(4),
    *(_own(size, "one shot", "ipq", STORAGE[size]) for size in ("13x", "30x", "20x")),
    _own("8x", "one shot", "ipq", {"block_size": 2}),
    _own("int4", INTN, "fixed_point", {"bits": 4, "observer": "channel"}),
    *(_own(size, "one shot, bits allocated", "ipq", c) for size, c in ALLOCATED.items()),
    *(_own(size, "one shot, two codebooks", "ipq", c) for size, c in TWO_CODEBOOKS.items()),
    _torchao(1, 64, "asymmetric"),
    _quanto(2),
    _torchao(8, None, "symmetric"),
    _quanto(8),
    _own("int8", INTN, "fixed_point", {"bits": 8, "observer": "channel"}),
]
QUANTIZERS = {"torchao": peer_libraries.torchao_model, "quanto": peer_libraries.quanto_model}
PACKAGES = {"torchao": "torchao", "quanto": "optimum-quanto"}


@dataclass
class Arguments(Selection):
    """Selection of rows, and their file."""

    results: str = field(
        default=f"benchmarks/results/quality_{STUDY}.jsonl", metadata={"help": "One line per row."}
    )


def require_library(name: str) -> None:
    """Raise an ``ImportError`` that names the command if a library is not installed."""
    module = "optimum.quanto" if name == "quanto" else name
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        found = False
    if not found:
        raise ImportError(
            f"{name} is not installed; run `{peer_libraries.INSTALL[name]}`, or select other rows "
            "with --methods"
        )


def quantized_by_this_package(
    model: PreTrainedModel, folder: str, key: dict, train: Dataset
) -> tuple[PreTrainedModel, int]:
    """Quantize in one shot; lookups of rows are counted on the training data."""
    setting = key["setting"]
    if setting["scheme"] == "ipq":
        config = storage_of(key, model, train, folder_of(model))
    else:
        config = FixedPointConfig(**setting["config"])
    batches = None
    if "frequent_rows" in setting["config"]:
        batches = glue.batches_of(train, folder_of(model))
    small = quantize_model(copy.deepcopy(model), config, progress=False, calibration_data=batches)
    small.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder), weight_bytes(folder)


def folder_of(model: PreTrainedModel) -> str:
    """Return the folder that a model was loaded from."""
    return model.config._name_or_path


def quantized(
    model: PreTrainedModel, folder: str, key: dict, train: Dataset
) -> tuple[PreTrainedModel, int]:
    """Return the model of a row, loaded from a file in a folder, and the bytes of its weights."""
    options = dict(key["setting"])
    library = options.pop("library")
    if library == "hf_quantnoise":
        return quantized_by_this_package(model, folder, key, train)
    require_library(library)
    path = os.path.join(folder, "model.safetensors")
    return QUANTIZERS[library](model, path, **options)


@cache
def dense_model(start: str) -> PreTrainedModel:
    """Return the float32 model in a folder."""
    return AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)


@cache
def dense_logits(start: str, data_dir: str, task: str, split: str):
    """Return logits and labels of the float32 model on a split."""
    return glue.logits_of(
        dense_model(start), getattr(glue.load(data_dir, start, task), split), start
    )


def run(args: Arguments, key: dict) -> dict:
    """Quantize one model; return its figures."""
    task, start = key["task"], start_of(args, key["task"], key["seed"])
    data = glue.load(args.data_dir, start, task)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        small, size = quantized(dense_model(start), folder, key, data.train)
        figures = {
            "seconds": time.monotonic() - begun, "steps": 0, "bytes": size,
            "file_bytes": weight_bytes(folder), "float32_bytes": weight_bytes(start),
        }  # fmt: skip
        for name in ("held_out", "dev"):
            expected, labels = dense_logits(start, args.data_dir, task, name)
            logits, _ = glue.logits_of(small, getattr(data, name), start)
            figures[name], figures[f"{name}_float32"], figures[f"{name}_correct"] = (
                figures_of_logits(glue.TASKS[task], labels, expected, logits)
            )
    if package := PACKAGES.get(key["setting"]["library"]):
        figures["library_version"] = version(package)
    return figures


def main() -> None:
    """Run what is missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    run_missing(args, STUDY, lambda task: METHODS, run)


if __name__ == "__main__":
    main()
