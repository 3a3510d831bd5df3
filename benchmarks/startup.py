"""CPU time of starting up: importing the package, and short commands, beside their libraries.

Each case runs in a new process. All cases run in turn, so that a drift of the machine affects all
of them; times are user and system time of the process.

    python benchmarks/startup.py

The run is appended to ``--results``; the table of the last one is written into
docs/reference/performance.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from pages import add_page_arguments, fill_page
from results_file import append_line, provenance, read_lines
from transformers import BertConfig, BertForSequenceClassification

from hf_quantnoise import IPQConfig, quantize_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "startup.jsonl"
PAGE = ROOT / "docs" / "reference" / "performance.md"
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 64, "vocab_size": 512}  # fmt: skip
UNKNOWN = "--unknown"  # a usage error: exit code 2
TRAINER = "import torch, transformers.trainer"
LIBRARIES = "import torch, transformers"
# Case -> arguments of Python, the case that it is compared with, and the goal of the ratio.
CASES: dict[str, tuple[list[str], str, str]] = {
    TRAINER: (["-c", TRAINER], TRAINER, ""),
    "import torch, transformers.modeling_utils": (
        ["-c", "import torch, transformers.modeling_utils"], TRAINER, ""),
    LIBRARIES: (["-c", LIBRARIES], TRAINER, ""),
    f"{LIBRARIES}, hf_quantnoise": (["-c", f"{LIBRARIES}, hf_quantnoise"], LIBRARIES, "+ 0.2 s"),
    **{
        f"hf-quantnoise {line}": (["-m", "hf_quantnoise", *line.split()], TRAINER, "1/3")
        for line in (
            "--help", "--version", f"compress dense small {UNKNOWN}", f"finetune glue {UNKNOWN}",
            "report packed", "plan dense",
        )
    },
}  # fmt: skip


def cpu_seconds(arguments: list[str], folder: str) -> float:
    """Return the user and system time of a new Python process.

    Raises:
        RuntimeError: if it fails; or does not, with an unknown flag.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    if done.returncode != (2 if UNKNOWN in arguments else 0):
        raise RuntimeError(f"{arguments}:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of each case; the first round, which may compile files, is not counted."""
    torch.manual_seed(0)
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        model = BertForSequenceClassification(BertConfig(**SIZES))
        model.save_pretrained(os.path.join(folder, "dense"))
        config = IPQConfig(n_centroids=16, kmeans_iter=1)
        quantize_model(model, config, progress=False)
        model.save_pretrained(os.path.join(folder, "packed"))
        for repetition in range(repetitions + 1):
            for case in CASES if repetition % 2 else reversed(CASES):
                spent = cpu_seconds(CASES[case][0], folder)
                if repetition:
                    seconds[case].append(round(spent, 3))
    return seconds


def table(line: dict) -> str:
    """Return a run as a Markdown table."""
    text = [
        "| process | CPU seconds, best | median | of | ratio, best | ratio, median | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    seconds = line["seconds"]
    for case, (_, reference, goal) in CASES.items():
        if case not in seconds:  # of an earlier version of this script
            continue
        best, middle = min(seconds[case]), statistics.median(seconds[case])
        against = seconds[reference]
        ratios = [f"{best / min(against):.2f}", f"{middle / statistics.median(against):.2f}"]
        cells = [f"`{case}`", f"{best:.2f}", f"{middle:.2f}", f"`{reference}`", *ratios, goal]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", "\n\n".join(provenance([line]))])


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="processes of each case")
    add_page_arguments(parser, RESULTS, PAGE)
    parser.add_argument("--table", action="store_true", help="write the table without measuring")
    args = parser.parse_args(argv)
    if not args.table:
        key = {"repetitions": args.repetitions}
        append_line(args.results, key, {"seconds": measure(args.repetitions)})
    line = read_lines(args.results)[-1]
    fill_page(args.page, startup=table(line))
    print(table(line))


if __name__ == "__main__":
    main()
