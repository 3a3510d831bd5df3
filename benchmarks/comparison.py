"""This package beside other ways to store a model: bytes, quality, speed and load time.

All forms begin with the same finetuned float32 models: MiniLM on SST-2, of
``quality/glue_float32.py``, and a small Llama on WikiText-2, of ``language_model_float32.py``.
Each form is written to a folder, loaded from it and evaluated, in a separate process.

    pip install torchao==0.18.0 optimum-quanto==0.2.7 bitsandbytes==0.50.2
    python benchmarks/comparison.py --data_dir ../shared/data      # bytes and quality
    python benchmarks/comparison.py --data_dir ../shared/data --latency   # of the forms that exist
    python benchmarks/comparison.py --table --page docs/reference/comparison.md

Each form appends a line to ``--results``; forms that are there are skipped, unless they could not
be measured. A form whose package is not installed gets no line, and the reason in the table.
``--latency`` times all forms in turn, in one process, and does not evaluate.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

# aqlm's kernel gives wrong results with several threads; numba reads this when it is imported.
os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "quality"))

import torch
from comparison_checkpoints import CHECKPOINTS, Checkpoint
from comparison_forms import Form, dense_matrices, forms
from comparison_table import tables
from glue_compress import start_of
from pages import add_table_arguments, show
from results_file import append_line, read_lines
from speed import BASE, CLOCKS, measure
from torch import nn

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "results")
PACKAGES = {"optimum.quanto": "optimum-quanto"}
TOKENIZER = ("tokenizer", "vocab", "special_tokens", "merges", "added_tokens")


def checkpoint_of(args: argparse.Namespace, name: str, seed: int) -> Checkpoint:
    """Return a checkpoint by name."""
    folder = args.llama_dir if name == "stories" else start_of(args, "sst2", seed)
    return CHECKPOINTS[name](folder, args.data_dir, seed)


def folder_of(args: argparse.Namespace, checkpoint: Checkpoint, name: str) -> str:
    """Return the folder of a form."""
    words = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
    return os.path.join(args.work_dir, f"{checkpoint.name}-{checkpoint.seed}", words)


def needed_files(folder: str) -> dict[str, int]:
    """Return file -> bytes of all files in a folder but those of a tokenizer."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in files
        if not path.name.startswith(TOKENIZER)
    }


def isolated(run: Callable[..., dict], *args) -> dict:
    """Return what a function returns in another process, or ``{"failed": reason}``.

    Libraries can end the process, which must not end the benchmark.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(sender, run, args))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        found = {"failed": f"the process ended with {reason}"}
    process.join()
    return found


def _send(sender, run, args) -> None:
    try:
        sender.send(run(*args))
    except Exception as error:  # any library may raise anything; the reason goes to the table
        traceback.print_exc()
        first_line = (str(error) or type(error).__name__).splitlines()[0].split("; ")[0]
        reason = textwrap.shorten(first_line, 160, placeholder=" ...")
        sender.send({"failed": f"{type(error).__name__}: {reason}"})


def written(args: argparse.Namespace, checkpoint: Checkpoint, form: Form) -> str:
    """Write a form, if its folder is not there; return the folder."""
    if form.write is None:
        return folder_of(args, checkpoint, form.start)
    folder = folder_of(args, checkpoint, form.name)
    start = checkpoint.folder if form.start is None else folder_of(args, checkpoint, form.start)
    if not os.path.isdir(folder):
        part = f"{folder}.part"
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        form.write(checkpoint, part, start)
        os.rename(part, folder)
    return folder


def quality(args: argparse.Namespace, checkpoint: Checkpoint, form: Form) -> dict:
    """Write, load and evaluate one form; return its figures."""
    folder = written(args, checkpoint, form)
    model = form.load(checkpoint, folder)
    files = needed_files(folder)
    return {
        "bytes": sum(files.values()),
        "files": files,
        "dense": dense_matrices(checkpoint.dense, model),
        "dev": checkpoint.figures(model),
        "library_versions": {n: version(PACKAGES.get(n, n)) for n in form.requires},
    }


def run_quality(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Measure bytes and quality of the selected forms that have no row yet."""
    done = [line["key"] for line in read_lines(args.results) if "failed" not in line]
    for form in selected(args, checkpoint):
        key = {"part": "quality", "model": checkpoint.name, "form": form.name}
        key["seed"] = checkpoint.seed
        if form.missing or key in done:
            continue
        if reason := form.missing_package():
            print(f"{form.name}: {reason}", flush=True)
            continue
        checkpoint.prepare()
        figures = isolated(quality, args, checkpoint, form)
        append_line(args.results, key, figures)
        print(checkpoint.name, form.name, checkpoint.seed, figures, flush=True)


def selected(args: argparse.Namespace, checkpoint: Checkpoint) -> list[Form]:
    """Return the forms that the command line selects; the float32 model is always one."""
    every = forms(checkpoint.sizes)
    return [f for f in every if args.forms is None or f.name in (BASE, *args.forms)]


def run_latency(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Time the forms that were written, in turn: each case, then loading."""
    keys = [line["key"] for line in read_lines(args.results) if "failed" not in line]
    measured = {
        key["form"] for key in keys if key.get("model") == checkpoint.name and "form" in key
    }
    ready = [
        f for f in selected(args, checkpoint) if f.name in measured and not f.missing_package()
    ]
    if BASE not in [form.name for form in ready]:
        raise ValueError(f"no form of {checkpoint.name} was measured; run without --latency first")
    loads = {f.name: partial(f.load, checkpoint, written(args, checkpoint, f)) for f in ready}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {name: load() for name, load in loads.items()}
    settings = {"threads": args.threads, "clock": args.clock, "repetitions": args.repetitions}
    torch.manual_seed(checkpoint.seed)
    for label, case in checkpoint.cases().items():
        key = {"part": "latency", "model": checkpoint.name, "case": label, **settings}
        figures = measure(case, models, args.repetitions, CLOCKS[args.clock])
        append_line(args.results, key, {"forms": figures})
        print(f"{checkpoint.title}, {label}: done", flush=True)
    key = {"part": "load", "model": checkpoint.name, **settings}
    append_line(args.results, key, {"seconds": load_seconds(loads, min(args.repetitions, 3))})


def load_seconds(loads: dict[str, Callable[[], nn.Module]], repetitions: int) -> dict[str, float]:
    """Return the median seconds to load each form, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in loads}
    for _ in range(repetitions):
        for name, load in loads.items():
            gc.collect()
            start = time.perf_counter()
            load()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="../shared/data", help="folder of sst2, wikitext2")
    parser.add_argument("--models", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="of MiniLM")
    parser.add_argument("--forms", nargs="+", help="only these, besides float32")
    parser.add_argument("--start_dir", default="benchmarks/runs/float32")
    parser.add_argument("--start_results", default=os.path.join(RESULTS, "glue_float32.jsonl"))
    parser.add_argument("--llama_dir", default="benchmarks/runs/lm/stories-1500-0.003-42")
    parser.add_argument("--work_dir", default="benchmarks/runs/comparison", help="of the forms")
    add_table_arguments(parser, os.path.join(RESULTS, "comparison.jsonl"))
    parser.add_argument("--trained_results", default=RESULTS, help="folder of quality_*.jsonl")
    parser.add_argument("--latency", action="store_true", help="time forms that were measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=9, help="rounds over all forms")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if not args.table:
        for name in args.models:
            # There is one Llama, whose seed is 42.
            for seed in args.seeds[:1] if args.latency or name == "stories" else args.seeds:
                (run_latency if args.latency else run_quality)(
                    args, checkpoint_of(args, name, seed)
                )
    show(args, "comparison", tables(read_lines(args.results), args.trained_results))


if __name__ == "__main__":
    main()
