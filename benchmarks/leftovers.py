#!/usr/bin/env python
"""Divergence that 8-bit leftovers and 16- or 8-bit centroids add to that of the compression.

The divergence KL(float32 model || model) in nats, mean over the examples of a parquet file, of one
finetuned classifier in several forms. Nothing is trained, and codes are the same in all rows, so
the differences are those of storage alone.

    python benchmarks/leftovers.py --model_dir MODEL --data_file ../shared/data/sst2/dev.parquet
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_quantnoise import FixedPointConfig, IPQConfig, quantize_model, size_report

BLOCKS = {
    "blocks of 4": {"block_size": 4},
    "blocks of 8, 16, 8": {"block_size": {"ffn": 8, "embeddings": 16, "attention": 8}},
}
STORAGE = [
    {"codebook_bits": codebook, "leftover_bits": leftover}
    for codebook, leftover in ((32, 32), (16, 32), (8, 32), (32, 16), (32, 8), (16, 8), (8, 8))
]


@dataclass
class Arguments:
    """A finetuned classifier, and data."""

    model_dir: str = field(metadata={"help": "Folder of a finetuned classifier."})
    data_file: str = field(metadata={"help": "Parquet file with sentence, or sentence1 and 2."})
    max_examples: int = field(default=512, metadata={"help": "Examples that are read."})


@torch.no_grad()
def log_probabilities(model, batches: list[dict]) -> torch.Tensor:
    """Return the log probabilities of the classes, (examples, classes)."""
    return torch.cat([F.log_softmax(model(**batch).logits, -1) for batch in batches])


def read_batches(args: Arguments) -> list[dict]:
    """Return tokenized batches."""
    rows, tokenizer = (
        Dataset.from_parquet(args.data_file),
        AutoTokenizer.from_pretrained(args.model_dir),
    )
    rows = rows.select(range(min(args.max_examples, len(rows))))
    columns = [name for name in rows.column_names if name.startswith("sentence")]
    texts = [tuple(row[name] for name in columns) for row in rows]
    return [
        dict(tokenizer(*map(list, zip(*texts[i : i + 32], strict=True)), padding=True,
                       truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(texts), 32)
    ]  # fmt: skip


def main() -> None:
    """Print one line per form of the model."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    batches = read_batches(args)

    def load():
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model_dir, dtype=torch.float32
        )
        return model.eval()

    reference = log_probabilities(load(), batches)
    print("| stored | MB | divergence | same class |\n|---|---|---|---|")

    def show(name: str, config) -> None:
        model = quantize_model(load(), config, progress=False)
        found = log_probabilities(model, batches)
        divergence = F.kl_div(found, reference, reduction="batchmean", log_target=True).item()
        same = (found.argmax(-1) == reference.argmax(-1)).float().mean().item()
        megabytes = size_report(model).total.disk_bytes / 1e6
        print(f"| {name} | {megabytes:.3f} | {divergence:.6f} | {same:.1%} |", flush=True)

    # One small layer in 8 bits, everything else as the leftovers of a compressed model.
    show(
        "leftovers alone: head in 8 bits, other tensors in float16",
        FixedPointConfig(
            observer="channel", target_modules=r".*pooler\.dense|classifier", leftover_bits=16
        ),
    )
    for blocks, sizes in BLOCKS.items():
        for storage in STORAGE:
            text = f"{blocks}; centroids {storage['codebook_bits']}"
            text += f", leftovers {storage['leftover_bits']}"
            show(text, IPQConfig(**sizes, **storage))


if __name__ == "__main__":
    main()
