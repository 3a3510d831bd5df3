#!/usr/bin/env python
"""Accuracy and size of both forms of an ONNX export on GLUE.

    python benchmarks/quality/onnx_forms.py --data_dir ../shared/data --tasks mrpc sst2

Each row begins with the float32 model that ``glue_float32.py`` trained with the same seed. It is
compressed 13 times in one shot with 8-bit centroids and exported in both forms, which onnxruntime
runs on the dev examples. The int8 form rounds the inputs of a layer by the range of the batch,
so it is run with batches of 64 and with single examples. Finished rows are skipped. The table is
written into docs/how_to/export.md; ``--table`` writes it without running anything.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import glue
import numpy as np
import onnxruntime
import torch
from datasets import Dataset
from glue_compress import Selection, figures_of_logits, run_missing, start_of, weight_bytes
from glue_studies import STORAGE
from pages import fill_page
from results_file import provenance, read_lines
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
)

from hf_quantnoise import IPQConfig, export_onnx, quantize_model

ROOT = Path(__file__).resolve().parents[2]
STUDY, SIZE = "onnx_forms", "13x"
CONFIG = {**STORAGE[SIZE], "codebook_bits": 8}
# (form, batch size) of a table's row; "packed" is the model in torch.
FORMS = [("packed", 64), ("fp32", 64), ("int8", 64), ("int8", 1)]


@dataclass
class Arguments(Selection):
    """Selection of rows, their file, and the page."""

    results: str = field(
        default=f"benchmarks/results/quality_{STUDY}.jsonl", metadata={"help": "One line per row."}
    )
    page: str = field(
        default=str(ROOT / "docs" / "how_to" / "export.md"), metadata={"help": "Page of the table."}
    )
    table: bool = field(default=False, metadata={"help": "Write the table without running."})


def session_of(file: Path) -> onnxruntime.InferenceSession:
    """Return a session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options)


def logits_in_onnxruntime(
    session: onnxruntime.InferenceSession, data: Dataset, model_dir: str, batch_size: int
) -> torch.Tensor:
    """Return the logits of all examples, in the order of the data."""
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(model_dir), return_tensors="np")
    order = np.argsort([len(ids) for ids in data["input_ids"]], kind="stable")
    logits = {}
    for start in range(0, len(order), batch_size):
        rows = [int(row) for row in order[start : start + batch_size]]
        batch = collate([data[row] for row in rows])
        batch.pop("labels", None)
        logits |= zip(rows, session.run(["logits"], dict(batch))[0], strict=True)
    return torch.tensor(np.stack([logits[row] for row in range(len(data))]))


def run(args: Arguments, key: dict) -> dict:
    """Compress and export one model; return the figures of each form."""
    torch.set_num_threads(1)
    task, start = glue.TASKS[key["task"]], start_of(args, key["task"], key["seed"])
    teacher = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    dev = glue.load(args.data_dir, start, task.name).dev
    expected, labels = glue.logits_of(teacher, dev, start)
    config = IPQConfig(seed=key["seed"], **key["setting"]["config"])
    small = quantize_model(copy.deepcopy(teacher), config, progress=False)
    figures: dict = {
        "float32": glue.scores(task, expected, labels), "float32_bytes": weight_bytes(start)
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        sizes, sessions = {"packed": weight_bytes(folder)}, {}
        for dtype in ("fp32", "int8"):
            file = export_onnx(small, os.path.join(folder, "onnx"), dtype=dtype).file
            sizes[dtype], sessions[dtype] = file.stat().st_size, session_of(file)
        for form, batch_size in FORMS:
            if form == "packed":
                logits, _ = glue.logits_of(small, dev, start)
            else:
                logits = logits_in_onnxruntime(sessions[form], dev, start, batch_size)
            figures[f"{form}, {batch_size}"] = {
                **figures_of_logits(task, labels, expected, logits)[0], "bytes": sizes[form],
            }  # fmt: skip
    return figures


def table(lines: list[dict]) -> str:
    """Return the rows as Markdown, one row per model and form."""
    text = [
        "| task, seed | form | batch | MB | metric | loss | KL from float32 | same answers |",
        "|---" * 8 + "|",
    ]
    for line in lines:
        key, metric = line["key"], glue.TASKS[line["key"]["task"]].metric_name
        name = f"{key['task']}, {key['seed']}"
        dense = line["float32"]
        cells = [name, "float32, not compressed", "64", f"{line['float32_bytes'] / 1e6:.1f}"]
        cells += [f"{dense[metric]:.4f}", f"{dense['loss']:.4f}", "", ""]
        text.append(f"| {' | '.join(cells)} |")
        for form, batch_size in FORMS:
            found = line[f"{form}, {batch_size}"]
            cells = [name, form, str(batch_size), f"{found['bytes'] / 1e6:.2f}"]
            cells += [f"{found[metric]:.4f}", f"{found['loss']:.4f}"]
            cells += [f"{found['divergence']:.5f}", f"{100 * found['agreement']:.2f}%"]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", "\n\n".join(provenance(lines))])


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, and write the table."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args=argv)
    if not args.table:
        run_missing(args, STUDY, lambda task: [(SIZE, "one shot", {"config": CONFIG})], run)
    lines = read_lines(args.results)
    fill_page(args.page, onnx_forms=table(lines))


if __name__ == "__main__":
    main()
