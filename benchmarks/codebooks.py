#!/usr/bin/env python
"""Options of the codebooks at the same size, in one shot on a finetuned classifier.

A row is one way to fit codebooks. Options that store more (a scale per row, a second codebook) have
centroids of lower precision. The metrics are accuracy and the divergence KL(dense || quantized) of
the predictions in nats, on a file of sentences. Nothing is trained.

    python benchmarks/codebooks.py --checkpoint runs/sst2/dense --data_dir ../shared/data/sst2
    python benchmarks/codebooks.py --table

Each finished row appends one line to ``--results``; rows that are already there are skipped.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field

import datasets
import torch
from results_file import append_line, provenance, read_lines  # adds the examples to sys.path
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_quantnoise import IPQConfig, quantize_model
from hf_quantnoise.compression.distillation.losses import softmax_divergence
from hf_quantnoise.configuration.flags import parse_int_or_dict

# Changes of each row to k-means with float32 centroids. Two codebooks have blocks twice as long and
# 8-bit centroids, which is the size of one float32 codebook of half the block size.
ROWS = {
    "plain": {},
    "importance": {"importance": "activations"},
    "row scale": {"row_scale": True, "codebook_bits": 16},
    "row scale, importance": {
        "row_scale": True,
        "codebook_bits": 16,
        "importance": "activations",
    },
    "two codebooks": {"n_codebooks": 2, "codebook_bits": 8},
    "two codebooks, importance": {
        "n_codebooks": 2,
        "codebook_bits": 8,
        "importance": "activations",
    },
}


@dataclass
class BenchmarkArguments:
    """Selection of rows, model and data."""

    checkpoint: str | None = field(default=None, metadata={"help": "Finetuned float model."})
    data_dir: str = field(
        default="../shared/data/sst2",
        metadata={
            "help": "Folder with train.parquet and dev.parquet (columns sentence and label)."
        },
    )
    results: str = field(
        default="benchmarks/results/codebooks.jsonl", metadata={"help": "One line per row."}
    )
    rows: list[str] = field(
        default_factory=lambda: list(ROWS), metadata={"help": f"Rows, from {', '.join(ROWS)}."}
    )
    block_size: str = field(
        default="ffn=8,embeddings=8,attention=4",
        metadata={"help": "Block size of rows with one codebook, as in run_glue.py."},
    )
    n_centroids: int = field(default=256, metadata={"help": "Centroids per codebook."})
    calibration_batches: int = field(default=8, metadata={"help": "Batches of training sentences."})
    batch_size: int = field(default=32, metadata={"help": "Sentences per batch."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens per sentence."})
    eval_samples: int | None = field(
        default=None, metadata={"help": "Dev sentences; default: all."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of k-means and of the calibration data."})
    table: bool = field(
        default=False, metadata={"help": "Print the table of --results without running anything."}
    )

    def __post_init__(self) -> None:
        for row in self.rows:
            if row not in ROWS:
                raise ValueError(f"invalid --rows {row!r}: expected some of {', '.join(ROWS)}")
        if not self.table and self.checkpoint is None:
            raise ValueError("missing --checkpoint; pass a finetuned float model, or --table")


def _config(args: BenchmarkArguments, row: str) -> IPQConfig:
    changes = ROWS[row]
    sizes = parse_int_or_dict("block_size", args.block_size)
    if changes.get("n_codebooks") == 2:
        doubled = isinstance(sizes, dict)
        sizes = {key: 2 * size for key, size in sizes.items()} if doubled else 2 * sizes
    changes = {"codebook_bits": 32, "leftover_bits": 32, **changes}
    return IPQConfig(block_size=sizes, n_centroids=args.n_centroids, seed=args.seed, **changes)


def _batches(args: BenchmarkArguments, split: str) -> tuple[list[dict], list[Tensor]]:
    """Return tokenized batches of a split and their labels.

    Of the training split these are a few random batches for calibration.
    """
    file = os.path.join(args.data_dir, f"{split}.parquet")
    data = datasets.Dataset.from_parquet(file)
    count = args.eval_samples or len(data)
    if split == "train":
        data = data.shuffle(seed=args.seed)
        count = args.calibration_batches * args.batch_size
    data = data.select(range(min(count, len(data))))
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    batches, labels = [], []
    for start in range(0, len(data), args.batch_size):
        part = data[start : start + args.batch_size]
        batches.append(
            dict(
                tokenizer(
                    part["sentence"],
                    padding=True,
                    truncation=True,
                    max_length=args.max_seq_length,
                    return_tensors="pt",
                )
            )
        )
        labels.append(torch.tensor(part["label"]))
    return batches, labels


@torch.no_grad()
def _logits(model, batches: list[dict]) -> Tensor:
    return torch.cat([model.eval()(**batch).logits for batch in batches])


def _weight_bytes(model) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return os.path.getsize(os.path.join(folder, "model.safetensors"))


def run_all(args: BenchmarkArguments) -> None:
    """Measure every row that is not in the results file yet."""
    calibration, _ = _batches(args, "train")
    batches, labels = _batches(args, "dev")
    labels = torch.cat(labels)

    def load():
        return AutoModelForSequenceClassification.from_pretrained(args.checkpoint).float()

    dense_model = load()
    dense, dense_bytes = _logits(dense_model, batches), _weight_bytes(dense_model)
    done = [line["key"] for line in read_lines(args.results)]
    names = ("block_size", "n_centroids", "calibration_batches", "max_seq_length", "seed")
    for row in args.rows:
        checkpoint = os.path.normpath(args.checkpoint)
        key = {"row": row, "checkpoint": os.path.join(*checkpoint.split(os.sep)[-2:])}
        key |= {name: getattr(args, name) for name in names} | {"examples": len(labels)}
        if key in done:
            continue
        start = time.perf_counter()
        small = quantize_model(
            load(), _config(args, row), progress=False, calibration_data=calibration
        )
        seconds = time.perf_counter() - start
        logits = _logits(small, batches)
        figures = {
            "accuracy": float((logits.argmax(1) == labels).float().mean()),
            "dense_accuracy": float((dense.argmax(1) == labels).float().mean()),
            "divergence": float(softmax_divergence(logits, dense)),
            "bytes": _weight_bytes(small),
            "dense_bytes": dense_bytes,
            "seconds": seconds,
        }
        append_line(args.results, key, figures)


def table(lines: list[dict]) -> str:
    """Return the results as a Markdown table.

    Raises:
        ValueError: if there are none.
    """
    if not lines:
        raise ValueError("--results has no finished row; run the benchmark without --table first")
    text = [
        "| option | block size | seed | divergence | accuracy | MB | times smaller | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        key = line["key"]
        cells = (
            key["row"], key["block_size"], str(key["seed"]), f"{line['divergence']:.4f}",
            f"{100 * line['accuracy']:.1f}", f"{line['bytes'] / 1e6:.3f}",
            f"{line['dense_bytes'] / line['bytes']:.1f}", f"{line['seconds']:.0f}",
        )  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    text.append("")
    for checkpoint in dict.fromkeys(line["key"]["checkpoint"] for line in lines):
        first = next(line for line in lines if line["key"]["checkpoint"] == checkpoint)
        text.append(
            f"`{checkpoint}` in float32: {100 * first['dense_accuracy']:.1f}, "
            f"{first['key']['examples']:,} dev sentences. Rows with two codebooks have blocks "
            "twice as long as listed."
        )
    return "\n".join([*text, *provenance(lines)])


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(args=argv)
    if not args.table:
        run_all(args)
    print(table(read_lines(args.results)))


if __name__ == "__main__":
    main()
