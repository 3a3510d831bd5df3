#!/usr/bin/env python
"""Tables in groups of rows against one block size for all rows, in one shot on an encoder.

Only the table of token ids is quantized; nothing is trained. Lookups are counted on the training
sentences. On the dev sentences: the squared error of the table weighted by lookups, and that of the
last hidden states (of 128 sentences), both relative.

    python benchmarks/row_groups.py --checkpoint ../shared/models/minilm
    python benchmarks/row_groups.py --table

Each finished row appends one line to ``--results``; rows that are already there are skipped.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import product

import torch
from results_file import append_line, read_lines  # adds the examples to sys.path
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from hf_quantnoise import IPQConfig, quantize_model
from hf_quantnoise.lookups import count_lookups
from hf_quantnoise.runs.example_data import read_table

ROWS = {
    "all rows in blocks of 16": {"block_size": 16},
    "8,000 rows of 8, rest of 32": {"block_size": 8, "frequent_rows": 8000},
    "4,000 rows of 4, rest of 32": {"block_size": 4, "frequent_rows": 4000},
    "96% of lookups of 8, rest of 32": {"block_size": 8, "frequent_rows": 0.96},
    "first 8,000 ids of 8, rest of 32": {"block_size": 8, "frequent_rows": 8000},
    "all rows in blocks of 8": {"block_size": 8},
}
WITHOUT_COUNTS = "first 8,000 ids of 8, rest of 32"
DEV_BATCHES = 2  # of 64 sentences


@dataclass
class BenchmarkArguments:
    """Model, data and file of results."""

    checkpoint: str | None = field(default=None, metadata={"help": "Encoder to quantize."})
    data_dir: str = field(
        default="../shared/data/sst2",
        metadata={"help": "Folder with train.parquet and dev.parquet (column sentence)."},
    )
    seeds: int = field(default=3, metadata={"help": "Seeds of k-means, from 0."})
    results: str = field(default="benchmarks/results/row_groups.jsonl")
    table: bool = field(default=False, metadata={"help": "Print the table of the results."})


def batches_of(tokenizer, sentences: list[str]) -> list[dict]:
    """Return padded batches of 64 sentences."""
    parts = [sentences[start : start + 64] for start in range(0, len(sentences), 64)]
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [dict(tokenizer(part, **options)) for part in parts]


@torch.no_grad()
def hidden_states(model, batches: list[dict]) -> torch.Tensor:
    """Return the last hidden states of all tokens that are not padding."""
    states = [model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches]
    return torch.cat(states).double()


def measure(args: BenchmarkArguments, name: str, seed: int, train: list, dev: list) -> dict:
    """Quantize the table and return the measurements of a row."""
    # In float16, as some checkpoints are, the sums below would overflow.
    model = AutoModel.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    dense, reference = model.get_input_embeddings().weight.detach(), hidden_states(model, dev)
    counts = next(iter(count_lookups(model, dev).values())).double()
    data = [{"input_ids": torch.tensor([[0]])}] if name == WITHOUT_COUNTS else train
    config = IPQConfig(stages=["embeddings"], codebook_bits=16, seed=seed, **ROWS[name])
    config.exclude_modules = ["position_embeddings", "token_type_embeddings"]
    start = time.perf_counter()
    model = quantize_model(model, config, progress=False, calibration_data=data)
    seconds = time.perf_counter() - start
    layer = model.get_input_embeddings()
    error = (layer.weight.detach() - dense).double().square().sum(1)
    energy = dense.double().square().sum(1)
    states = hidden_states(model, dev)
    figures = {
        "bytes": layer.quantizer.packed_bytes(layer.rows, layer.columns),
        "stored": layer.quantizer.short_name,
        "table_error": float(error.sum() / energy.sum()),
        "lookup_error": float((counts * error).sum() / (counts * energy).sum()),
        "hidden_error": float((states - reference).square().sum() / reference.square().sum()),
        "seconds": seconds,
    }
    for key in ("table_error", "lookup_error", "hidden_error"):
        if not 0 < figures[key] < math.inf:
            raise ValueError(f"invalid {key} of {name!r}: got {figures[key]}, expected above 0")
    return figures


def print_table(lines: list[dict]) -> None:
    """Print the mean and the spread over seeds of each row, as Markdown."""
    print("| table | kB | error of the table | weighted by lookups | of the hidden states |")
    print("| --- | --- | --- | --- | --- |")
    for name in ROWS:
        if not (own := [line for line in lines if line["key"]["row"] == name]):
            continue
        cells = [f"{own[0]['bytes'] / 1e3:.0f}"]
        for key in ("table_error", "lookup_error", "hidden_error"):
            values = torch.tensor([line[key] for line in own])
            cells.append(f"{values.mean():.4f} ± {values.std():.4f}")
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Measure the rows that are missing, or print the table."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    lines = read_lines(args.results)
    if args.table:
        return print_table(lines)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    files = (f"{args.data_dir}/{part}.parquet" for part in ("train", "dev"))
    train, dev = (
        batches_of(tokenizer, list(read_table("data_dir", file)["sentence"])) for file in files
    )
    dev = dev[:DEV_BATCHES]
    done = [line["key"] for line in lines]
    for name, seed in product(ROWS, range(args.seeds)):
        if (key := {"row": name, "seed": seed}) not in done:
            append_line(args.results, key, measure(args, name, seed, train, dev))


if __name__ == "__main__":
    main()
