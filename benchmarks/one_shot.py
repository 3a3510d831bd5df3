"""Time and peak memory of compressing a model in one shot, in a new process for each shape.

Weights are random. The peak is that of the process (its resident set, with Python and torch); the
goal is the dense weights and 1 GiB.

    python benchmarks/one_shot.py
    python benchmarks/one_shot.py --shapes roberta-base

Each shape appends a line to ``--results``; those that are there are not measured again. The table
is written into docs/reference/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pages import add_page_arguments, fill_page
from results_file import append_line, provenance, read_lines
from timed import timed
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_quantnoise import IPQConfig, quantize_model, size_report
from hf_quantnoise.quantizers import ProductQuantizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "one_shot.jsonl"
PAGE = ROOT / "docs" / "reference" / "performance.md"
GOAL_BYTES = 2**30
GOAL_SECONDS = {"roberta-base": 60}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "vocab_size": 512}  # fmt: skip
SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "tiny": lambda: BertForSequenceClassification(BertConfig(**TINY)),
    "roberta-base": lambda: RobertaForSequenceClassification(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    ),
    "gpt2-medium": lambda: GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    # Llama 3.2 1B, whose head is tied to a table of 263 M values.
    "llama-1b": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                    num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                    tie_word_embeddings=True)
    ),
}  # fmt: skip
PARTS = {
    "k-means": [(ProductQuantizer, "fit")],
    "codes": [(ProductQuantizer, "encode")],
}


def peak_bytes() -> int:
    """Return the largest resident set that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # there in bytes


@torch.no_grad()
def create(shape: str, seed: int) -> PreTrainedModel:
    """Return a random model, without the memory of a tied head that is replaced."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = SHAPES[shape]()
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in made:
                values = torch.empty(weight.shape).normal_(0, 0.02, generator=generator)
                made[id(weight)] = nn.Parameter(values)
            setattr(module, name, made[id(weight)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return model


def compress(shape: str, seed: int) -> dict:
    """Compress a model in this process; return seconds and bytes."""
    before = peak_bytes()
    model = create(shape, seed)
    figures = {
        "parameters": model.num_parameters(),
        "dense": sum(tensor.nbytes for tensor in model.parameters()),
        "import_peak": before,
        "create_peak": peak_bytes(),
    }
    config = IPQConfig(n_centroids=16 if shape == "tiny" else 256, seed=seed)
    with timed(PARTS) as parts:
        start = time.perf_counter()
        quantize_model(model, config, progress=False)
        figures["seconds"] = time.perf_counter() - start
    figures |= {"peak": peak_bytes(), "parts": parts}
    return {**figures, "packed": size_report(model).total.disk_bytes}


def measure(shape: str, threads: int, seed: int) -> dict:
    """Return the output of :func:`compress` in a new process.

    Raises:
        RuntimeError: if it fails.
    """
    command = [sys.executable, __file__, "--compress", shape, "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(lines: list[dict]) -> str:
    """Return the results as a Markdown table."""
    text = [
        "| shape | parameters | threads | seconds | k-means | codes | goal | dense, MB "
        "| packed, MB | peak, MB | beyond dense, MB | goal, MB |",
        "|---" * 12 + "|",
    ]
    for line in lines:
        shape, parts = line["key"]["shape"], line["parts"]
        goal = GOAL_SECONDS.get(shape)
        cells = [shape, f"{line['parameters'] / 1e6:,.1f} M", str(line["key"]["threads"])]
        cells += [f"{line['seconds']:.1f}", *(f"{parts[name]:.1f}" for name in PARTS)]
        cells += [f"{goal}" if goal else ""]
        cells += [f"{line[name] / 1e6:,.0f}" for name in ("dense", "packed", "peak")]
        cells += [f"{(line['peak'] - line['dense']) / 1e6:,.0f}", f"{GOAL_BYTES / 1e6:,.0f}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", "\n\n".join(provenance(lines))])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[1:])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compress", choices=SHAPES, help="compress one shape in this process")
    add_page_arguments(parser, RESULTS, PAGE)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    if args.compress:
        print(json.dumps(compress(args.compress, args.seed)))
        return
    torch.set_num_threads(args.threads)  # for the line of the machine
    done = [line["key"] for line in read_lines(args.results)]
    for shape in args.shapes:
        key = {"shape": shape, "threads": args.threads, "seed": args.seed}
        if key not in done:
            append_line(args.results, key, measure(shape, args.threads, args.seed))
    lines = read_lines(args.results)
    fill_page(args.page, **{"one shot": table(lines)})
    print(table(lines))


if __name__ == "__main__":
    main()
