#!/usr/bin/env python
"""What each option of the pass is worth after finetuning, at the same bytes, over several seeds.

A row is a start (a checkpoint finetuned with or without noise, made once per seed) and how it is
compressed. Every figure is one run of an example, scored as it comes back from disk.

    python benchmarks/ablations.py --task sentences --table codewords \\
      --model_dir ../shared/models/minilm --data_dir ../shared/data/sst2
    python benchmarks/ablations.py --task text --table codewords \\
      --model_dir ../shared/models/stories260K --data_dir ../shared/data/wikitext2
    python benchmarks/ablations.py --task text --table codewords --print

A finished run appends one line to the results at once; runs that stand there are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from dataclasses import dataclass, field
from typing import Literal

from ablation_rows import CLEAN, STARTS, TABLES
from real_tasks import TASKS
from results_file import append_line, figures_of, provenance, read_lines
from transformers import HfArgumentParser

from hf_quantnoise.runs.compression_run import DENSE


@dataclass
class BenchmarkArguments:
    """What to run."""

    task: Literal["sentences", "text"] = field(metadata={"help": "Classifier or language model."})
    table: str = field(metadata={"help": f"Which rows: {', '.join(TABLES)}."})
    model_dir: str = field(default="", metadata={"help": "Pretrained checkpoint."})
    data_dir: str = field(default="", metadata={"help": "Holds the task's two files."})
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44], metadata={"help": "Seeds."})
    rows: list[str] | None = field(default=None, metadata={"help": "Only the rows of these names."})
    more: str = field(default="", metadata={"help": "Further flags of the example, in one word."})
    results: str = field(
        default="benchmarks/results/ablations.jsonl", metadata={"help": "One line per run."}
    )
    work_dir: str = field(
        default="benchmarks/runs/ablations", metadata={"help": "Starts are kept in it."}
    )
    print: bool = field(default=False, metadata={"help": "Print the table, run nothing."})

    def __post_init__(self) -> None:
        if self.table not in TABLES or self.task not in TABLES[self.table]:
            known = [name for name, tasks in TABLES.items() if self.task in tasks]
            raise ValueError(
                f"--table {self.table!r} has no rows for --task {self.task}; known for it: "
                f"{', '.join(known)}"
            )
        names = [row.name for row in TABLES[self.table][self.task]]
        for name in self.rows or ():
            if name not in names:
                raise ValueError(f"--rows {name!r} is unknown; known: {', '.join(names)}")
        if not self.print and not (self.model_dir and self.data_dir):
            raise ValueError("give --model_dir and --data_dir, or --print")


def _start_folder(args: BenchmarkArguments, start: str, seed: int) -> str:
    return os.path.join(args.work_dir, args.task, f"{start.replace(' ', '_')}-{seed}")


def _carry_out(args: BenchmarkArguments, key: dict, model: str, folder: str) -> None:
    task = TASKS[args.task]
    clean = os.path.join(_start_folder(args, CLEAN, key["seed"]), DENSE)
    flags = [
        *("--model_name_or_path", model, *task.words(args.data_dir, folder)),
        *(word.replace("{clean}", clean) for word in key["settings"].split()),
        *("--seed", str(key["seed"])),
    ]
    print(f"== {key}", flush=True)
    append_line(args.results, key, figures_of(task.run(task.parse(flags)), task.metric))


def _start(args: BenchmarkArguments, name: str, seed: int, done: list[dict]) -> str:
    """The checkpoint a row begins from; finetuned where it is missing."""
    settings = " ".join(
        [TASKS[args.task].flags, STARTS[args.task][name], args.more, "--no_compress"]
    )
    key = {"task": args.task, "start": name, "row": "float32", "settings": settings, "seed": seed}
    folder = _start_folder(args, name, seed)
    stamp = os.path.join(folder, "settings.json")
    wanted = json.dumps(key)
    if os.path.isfile(stamp):
        with open(stamp, encoding="utf-8") as file:
            made = file.read()
        if made != wanted:
            raise ValueError(f"--work_dir: {folder!r} was made with {made}; take another folder")
    if key not in done or not os.path.isfile(stamp):
        _carry_out(args, key, args.model_dir, folder)
        with open(stamp, "w", encoding="utf-8") as file:
            file.write(wanted)
    return os.path.join(folder, DENSE)


def run_all(args: BenchmarkArguments) -> None:
    """Carries out every run that is not in the results file yet."""
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
            for start in dict.fromkeys((CLEAN, row.start)):  # the clean one may be a teacher
                checkpoint = _start(args, start, seed, done)
            folder = os.path.join(args.work_dir, args.task, f"row-{os.getpid()}")
            _carry_out(args, key, checkpoint, folder)
            shutil.rmtree(folder)


# ---- the table -----------------------------------------------------------------------------------


def _mean(values: list[float], digits: int = 1) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(args: BenchmarkArguments, lines: list[dict]) -> str:
    """The markdown table of some rows: mean and sample standard deviation over seeds, and each.

    The divergence is the loss of the last stage's finetuning, which is all the teacher's: its mean
    over that stage, in nats. It follows the options more closely than a score of few examples.

    Raises:
        ValueError: if no row of the table was run.
    """
    task, rows = TASKS[args.task], TABLES[args.table][args.task]
    lines = [line for line in lines if line["key"]["task"] == args.task]
    starts = {
        (line["key"]["start"], line["key"]["seed"]): task.score(line[task.metric])
        for line in lines
        if line["key"]["row"] == "float32"
    }
    names = [(row.name, row.start) for row in rows]
    lines = [line for line in lines if (line["key"]["row"], line["key"]["start"]) in names]
    if not lines:
        raise ValueError(f"{args.results} has no finished row of --table {args.table}; run it")
    seeds = sorted({line["key"]["seed"] for line in lines})
    text = [
        f"| row | {task.metric}, float32 | {task.metric}, compressed | seeds "
        f"{' / '.join(map(str, seeds))} | divergence | MB | times smaller |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        own = [line for line in lines if line["key"]["row"] == row.name]
        if not own:
            continue
        by_seed = {line["key"]["seed"]: task.score(line[task.metric]) for line in own}
        dense = [starts[row.start, seed] for seed in by_seed if (row.start, seed) in starts]
        each = " / ".join(f"{by_seed[seed]:.1f}" if seed in by_seed else "-" for seed in seeds)
        last = [line["stages"][-1]["finetuning"]["train_loss"] for line in own]
        cells = (
            row.name, _mean(dense), _mean(list(by_seed.values())), each, _mean(last, 3),
            f"{own[0]['bytes'] / 1e6:.3f}", f"{own[0]['dense_bytes'] / own[0]['bytes']:.1f}",
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
