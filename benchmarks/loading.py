"""Time and memory of loading and running a packed model, compared with the dense model.

Each load runs in a separate process, dense and packed in turn, so that a drift of the machine
affects both. Weights are random, since neither time nor memory depends on them.

    python benchmarks/loading.py --model minilm roberta-base

Each model appends a line to ``--results``. Models that are already there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from results_file import append_line, provenance, read_lines
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_quantnoise import IPQConfig, quantize_model

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "results", "loading.jsonl")
KINDS = ("dense", "packed")
# With the page cache, and without it if the system can drop it.
COLD = (False, True) if hasattr(os, "posix_fadvise") else (False,)
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 512}  # fmt: skip
MODELS = {
    "tiny": lambda: BertForSequenceClassification(BertConfig(**TINY)),
    "minilm": lambda: BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                   intermediate_size=1536)
    ),
    "roberta-base": lambda: RobertaForSequenceClassification(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    ),
}  # fmt: skip


def save_pair(name: str, folder: str, args: argparse.Namespace) -> None:
    """Save a random model in ``folder/dense`` and ``folder/packed``."""
    torch.manual_seed(args.seed)
    model = MODELS[name]()
    model.save_pretrained(os.path.join(folder, "dense"))
    n_centroids = 16 if name == "tiny" else args.n_centroids
    # One iteration of k-means, since time does not depend on the codes.
    config = IPQConfig(block_size=args.block_size, n_centroids=n_centroids, kmeans_iter=1,
                       codebook_bits=args.codebook_bits,
                       leftover_bits=args.leftover_bits)  # fmt: skip
    quantize_model(model, config, progress=False)
    model.save_pretrained(os.path.join(folder, "packed"))


def load_once(folder: str, warm_up: str, args: argparse.Namespace, cold: bool = False) -> dict:
    """Return the output of `loaded_once.py` in a separate process; ``cold`` reads from disk.

    Raises:
        RuntimeError: if it fails.
    """
    command = [
        sys.executable, os.path.join(HERE, "loaded_once.py"), folder, warm_up,
        "--shapes", *args.shapes, "--repetitions", str(args.forwards),
        "--threads", str(args.threads), *(["--cold"] if cold else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, args: argparse.Namespace) -> dict:
    """Return medians over processes for dense and packed, and the size of their files."""
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for model in dict.fromkeys(("tiny", name)):
            save_pair(model, os.path.join(folder, model), args)
        for repetition in range(args.repetitions):
            for kind in KINDS if repetition % 2 else reversed(KINDS):
                paths = [os.path.join(folder, model, kind) for model in (name, "tiny")]
                found[kind].append({})
                for cold in COLD:
                    found[kind][-1] |= load_once(*paths, args, cold)
        figures = {
            kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for kind, runs in found.items()
        }
        for kind in KINDS:
            file = os.path.join(folder, name, kind, "model.safetensors")
            figures[kind]["file"] = os.path.getsize(file)
    return figures


def run_all(args: argparse.Namespace) -> None:
    """Measure every model that is not in the results file yet."""
    done = [line["key"] for line in read_lines(args.results)]
    settings = ("block_size", "n_centroids", "codebook_bits", "shapes", "repetitions", "forwards",
                "threads", "seed")  # fmt: skip
    for name in args.model:
        key = {"model": name, **{setting: getattr(args, setting) for setting in settings}}
        if args.leftover_bits != 32:  # rows without it have 32
            key["leftover_bits"] = args.leftover_bits
        if key not in done:
            append_line(args.results, key, measure(name, args))


def _label(figure: str) -> tuple[str, bool]:
    """Return the label of a value in the table, and whether it is a time."""
    named = {
        "file": ("file", False),
        "load": ("load", True),
        "load_peak": ("peak while loading", False),
        "first_output": ("load and first output", True),
        "cold_output": ("load and first output, files on disk only", True),
        "first_output_peak": ("peak until the first output", False),
        "held": ("memory held after all forwards", False),
    }
    if figure in named:
        return named[figure]
    kind, shape = figure.split()
    if kind == "forward":
        return f"forward, {shape} tokens", True
    return f"memory added by a forward, {shape} tokens", False


def table(lines: list[dict]) -> str:
    """Return the results as a Markdown table.

    Raises:
        ValueError: if there are none.
    """
    if not lines:
        raise ValueError("--results has no finished model; run the benchmark without --table first")
    text = ["| model | what | dense | packed | packed / dense |", "|---|---|---|---|---|"]
    for line in lines:
        dense, packed = (line[kind] for kind in KINDS)
        for figure in ("file", *(key for key in dense if key != "file")):
            label, is_time = _label(figure)
            scale, unit = (1e3, "ms") if is_time else (1e-6, "MB")
            cells = [f"{scale * values[figure]:,.1f} {unit}" for values in (dense, packed)]
            ratio = f"{packed[figure] / dense[figure]:.2f}" if dense[figure] > 0 else "-"
            text.append(f"| {' | '.join((line['key']['model'], label, *cells, ratio))} |")
    return "\n".join([*text, "", *provenance(lines)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["minilm", "roberta-base"])
    parser.add_argument("--block_size", type=int, default=8)
    parser.add_argument("--n_centroids", type=int, default=256)
    parser.add_argument("--codebook_bits", type=int, default=16)
    parser.add_argument("--leftover_bits", type=int, default=32)
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x128"], help="batch x length")
    parser.add_argument("--repetitions", type=int, default=7, help="processes of each kind")
    parser.add_argument("--forwards", type=int, default=9, help="forwards per process and shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default=RESULTS, help="JSON lines, appended to")
    parser.add_argument("--table", action="store_true", help="print the table without measuring")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if not args.table:
        run_all(args)
    print(table(read_lines(args.results)))


if __name__ == "__main__":
    main()
