#!/usr/bin/env python
"""Ablations: the effect of each option on a finetuned, compressed model of the same size.

A row is a start (a checkpoint finetuned with or without noise, once per seed) and the flags of its
compression. Each value is one run of an example, evaluated after saving and loading.

    python benchmarks/ablations.py --task sentences --table codebooks \\
      --model_dir ../shared/models/minilm --data_dir ../shared/data/sst2
    python benchmarks/ablations.py --task text --table codebooks \\
      --model_dir ../shared/models/stories260K --data_dir ../shared/data/wikitext2
    python benchmarks/ablations.py --task text --table codebooks --print

Each finished run appends one line to the results; runs that are already there are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from dataclasses import dataclass, field
from typing import Literal

from ablation_rows import CLEAN, REMOVED_ROWS, STARTS, TABLES
from real_tasks import TASKS
from results_file import append_line, figures_of, provenance, read_lines, stored_as_measured
from transformers import HfArgumentParser

from hf_quantnoise.runs.compression_run import DENSE


@dataclass
class BenchmarkArguments:
    """Selection of runs, data and folders."""

    task: Literal["sentences", "text"] = field(metadata={"help": "Classifier or language model."})
    table: str = field(metadata={"help": f"Table, one of {', '.join(TABLES)}."})
    model_dir: str = field(default="", metadata={"help": "Pretrained checkpoint."})
    data_dir: str = field(
        default="", metadata={"help": "Folder with the training and validation file of the task."}
    )
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44], metadata={"help": "Seeds."})
    rows: list[str] | None = field(default=None, metadata={"help": "Only these rows."})
    more: str = field(default="", metadata={"help": "Further flags of the example, as one string."})
    results: str = field(
        default="benchmarks/results/ablations.jsonl", metadata={"help": "One line per run."}
    )
    work_dir: str = field(
        default="benchmarks/runs/ablations", metadata={"help": "Folder for starts, which are kept."}
    )
    print: bool = field(
        default=False, metadata={"help": "Print the table without running anything."}
    )

    def __post_init__(self) -> None:
        if self.table not in TABLES or self.task not in TABLES[self.table]:
            known = [name for name, tasks in TABLES.items() if self.task in tasks]
            raise ValueError(
                f"invalid --table {self.table!r} for --task {self.task}: expected one of "
                f"{', '.join(known)}"
            )
        names = [row.name for row in TABLES[self.table][self.task]]
        for name in self.rows or ():
            if name not in names:
                raise ValueError(f"invalid --rows {name!r}: expected some of {', '.join(names)}")
        if not self.print and not (self.model_dir and self.data_dir):
            raise ValueError("--model_dir and --data_dir are required; pass both, or --print")


def _start_folder(args: BenchmarkArguments, start: str, seed: int) -> str:
    return os.path.join(args.work_dir, args.task, f"{start.replace(' ', '_')}-{seed}")


def _run_example(args: BenchmarkArguments, key: dict, model: str, folder: str) -> None:
    task = TASKS[args.task]
    clean = os.path.join(_start_folder(args, CLEAN, key["seed"]), DENSE)
    flags = [
        *("--model_name_or_path", model, *task.common_flags(args.data_dir, folder)),
        *stored_as_measured([f.replace("{clean}", clean) for f in key["settings"].split()]),
        *("--seed", str(key["seed"])),
    ]
    print(f"== {key}", flush=True)
    append_line(args.results, key, figures_of(task.run(task.parse(flags)), task.metric))


def _start(args: BenchmarkArguments, name: str, seed: int, done: list[dict]) -> str:
    """Return the checkpoint that a row starts from; finetune it if it is missing."""
    settings = " ".join(
        [TASKS[args.task].flags, STARTS[args.task][name], args.more, "--no_compress"]
    )
    key = {"task": args.task, "start": name, "row": "float32", "settings": settings, "seed": seed}
    folder = _start_folder(args, name, seed)
    stamp = os.path.join(folder, "settings.json")
    expected = json.dumps(key)
    if os.path.isfile(stamp):
        with open(stamp, encoding="utf-8") as file:
            found = file.read()
        if found != expected:
            raise ValueError(
                f"invalid --work_dir: {folder!r} has the settings {found}, expected {expected}; "
                "choose another folder"
            )
    if key not in done or not os.path.isfile(stamp):
        _run_example(args, key, args.model_dir, folder)
        with open(stamp, "w", encoding="utf-8") as file:
            file.write(expected)
    return os.path.join(folder, DENSE)


def run_all(args: BenchmarkArguments) -> None:
    """Run everything that is not in the results file yet."""
    rows = TABLES[args.table][args.task]
    rows = [row for row in rows if args.rows is None or row.name in args.rows]
    for seed in args.seeds:
        for row in rows:
            settings = [TASKS[args.task].flags, row.flags, args.more, "--do_train False"]
            key = {"task": args.task, "start": row.start, "row": row.name}
            key |= {"settings": " ".join(settings), "seed": seed}
            done = [line["key"] for line in read_lines(args.results)]
            if key in done:
                continue
            for start in dict.fromkeys(
                (CLEAN, row.start)
            ):  # the one without noise may be the teacher
                checkpoint = _start(args, start, seed, done)
            folder = os.path.join(args.work_dir, args.task, f"row-{os.getpid()}")
            _run_example(args, key, checkpoint, folder)
            shutil.rmtree(folder)


# ---- the table -----------------------------------------------------------------------------------


def _row_name(line: dict) -> str:
    """Return the name of a line's row; bit allocation had another name in older results."""
    return line["key"]["row"].replace("llott", "llocat")


def _mean(values: list[float], digits: int = 1) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(args: BenchmarkArguments, lines: list[dict]) -> str:
    """Return a Markdown table: mean and sample standard deviation over seeds, and each seed.

    The divergence is the mean distillation loss of the last stage, in nats. It varies less than the
    metric of few examples.

    Raises:
        ValueError: if the results have no row of the table.
    """
    task = TASKS[args.task]
    rows = [*TABLES[args.table][args.task], *REMOVED_ROWS.get(args.table, ())]
    lines = [line for line in lines if line["key"]["task"] == args.task]
    starts = {
        (line["key"]["start"], line["key"]["seed"]): task.score(line[task.metric])
        for line in lines
        if line["key"]["row"] == "float32"
    }
    names = [(row.name, row.start) for row in rows]
    lines = [line for line in lines if (_row_name(line), line["key"]["start"]) in names]
    if not lines:
        raise ValueError(
            f"no finished row of --table {args.table} in {args.results}; run the benchmark first"
        )
    seeds = sorted({line["key"]["seed"] for line in lines})
    text = [
        f"| row | {task.metric}, float32 | {task.metric}, compressed | seeds "
        f"{' / '.join(map(str, seeds))} | divergence | MB | times smaller |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        runs = [line for line in lines if _row_name(line) == row.name]
        if not runs:
            continue
        by_seed = {line["key"]["seed"]: task.score(line[task.metric]) for line in runs}
        dense = [starts[row.start, seed] for seed in by_seed if (row.start, seed) in starts]
        each = " / ".join(f"{by_seed[seed]:.1f}" if seed in by_seed else "-" for seed in seeds)
        last = [line["stages"][-1]["finetuning"]["train_loss"] for line in runs]
        cells = (
            row.name, _mean(dense), _mean(list(by_seed.values())), each, _mean(last, 3),
            f"{runs[0]['bytes'] / 1e6:.3f}", f"{runs[0]['dense_bytes'] / runs[0]['bytes']:.1f}",
        )  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    counts = lines[-1]["examples"]
    text += [
        "",
        f"{counts['train']:,} training and {counts['validation']:,} validation examples.",
        *provenance(lines),
    ]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(args=argv)
    if not args.print:
        run_all(args)
    print(table(args, read_lines(args.results)))


if __name__ == "__main__":
    main()
