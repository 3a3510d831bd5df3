#!/usr/bin/env python
"""All noises and quantizers on real text and images, like the paper's tables 1 and 5.

Each row is one run of an example: finetuned with a noise, compressed, and evaluated after saving
and loading. The dense model of the same run is listed too.

    python benchmarks/noises_and_quantizers.py --task text \\
      --model_dir ../shared/models/stories260K --data_dir ../shared/data/wikitext2
    python benchmarks/noises_and_quantizers.py --task images \\
      --model_dir ../shared/models/mobilenet_v1_0.75_224 --data_dir ../shared/data/cifar10
    python benchmarks/noises_and_quantizers.py --task text --table

Each finished run appends one line to the results; runs that are already there are skipped.
"""

from __future__ import annotations

import os
import shutil
import statistics
from dataclasses import dataclass, field
from typing import Literal

from real_tasks import TASKS, RealTask
from results_file import append_line, figures_of, provenance, read_lines, stored_as_measured
from transformers import HfArgumentParser

# Replacements of {pq} and {shared} below: settings of rows with product quantization, and flags of
# the row with shared and pruned layers, which is skipped for tasks without them.
PQ = {
    "text": "--block_size 4 --n_centroids 64 --stage_epochs 0.5 --codebook_learning_rate 5e-3",
    "images": "--block_size 4 --stages conv head --stage_epochs 0.5 --codebook_learning_rate 5e-3",
}
SHARED = {"text": "--share_layers 2 --prune_layers every_other --layerdrop 0.2"}
ONE_SHOT = "--stage_epochs 0"
INT8_CENTROIDS = "--codebook_bits 8 --activation_bits 8"


def _int(bits: int, observer: str = "minmax", more: str = "") -> str:
    return f"--scheme fixed_point --bits {bits} --observer {observer} {ONE_SHOT} {more}"


# (noise, its flags, compression, its flags); {pq} is replaced with settings of the task.
ROWS = [
    ("none", "", "PQ, one shot", "{pq} --stage_epochs 0"),
    ("none", "", "iPQ", "{pq}"),
    ("proxy", "--noise_rate 0.1", "iPQ", "{pq}"),
    ("proxy, clusters", "--noise_rate 0.1 --noise_block_selection cluster", "iPQ", "{pq}"),
    ("mean", "--noise_rate 0.1", "iPQ", "{pq}"),
    ("pq", "--noise_rate 0.1", "iPQ", "{pq}"),
    ("pq, clusters", "--noise_rate 0.1 --noise_block_selection cluster", "iPQ", "{pq}"),
    ("none", "", "iPQ + int8", "{pq} " + INT8_CENTROIDS),
    ("pq int8", "--noise_rate 0.1", "iPQ + int8", "{pq} " + INT8_CENTROIDS),
    ("none", "", "int8", _int(8)),
    ("none", "", "int8, activations too", _int(8, more="--activation_bits 8")),
    ("int8", "--noise_rate 0.5", "int8", _int(8)),
    ("none", "", "int4", _int(4)),
    ("none", "", "int4, histogram", _int(4, "histogram")),
    ("none", "", "int4, channel", _int(4, "channel")),
    ("int4", "--noise_rate 0.5", "int4", _int(4)),
    ("int4", "--noise_rate 1", "int4 (QAT)", _int(4)),
    ("int4", "--noise_rate 0.5", "int4, channel", _int(4, "channel")),
    ("proxy", "--noise_rate 0.1", "iPQ, shared and pruned", "{pq} {shared}"),
]


@dataclass
class BenchmarkArguments:
    """Selection of runs, data and folders."""

    task: Literal["text", "images"] = field(metadata={"help": "Language model, or image classes."})
    model_dir: str = field(default="", metadata={"help": "Pretrained checkpoint."})
    data_dir: str = field(
        default="", metadata={"help": "Folder with the training and validation file of the task."}
    )
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "Seeds."})
    rows: list[int] | None = field(
        default=None, metadata={"help": "Only the rows with these indices, from 0."}
    )
    more: str = field(default="", metadata={"help": "Further flags of the example, as one string."})
    results: str | None = field(
        default=None, metadata={"help": "Default: benchmarks/results/noises_<task>.jsonl."}
    )
    work_dir: str = field(
        default="benchmarks/runs/noises", metadata={"help": "Folder for the runs."}
    )
    table: bool = field(
        default=False, metadata={"help": "Print the table without running anything."}
    )

    def __post_init__(self) -> None:
        self.results = self.results or f"benchmarks/results/noises_{self.task}.jsonl"
        if not self.table and not (self.model_dir and self.data_dir):
            raise ValueError("--model_dir and --data_dir are required; pass both, or --table")


def _settings(task: str, row: tuple[str, str, str, str]) -> list[str]:
    """Return the flags that define a row."""
    noise, noise_flags, _, compression = row
    return [
        *("--noise", *noise.partition(",")[0].split(), *noise_flags.split()),
        *TASKS[task].flags.split(),
        *compression.format(pq=PQ[task], shared=SHARED.get(task)).split(),
    ]


def run_all(args: BenchmarkArguments) -> None:
    """Run everything that is not in the results file yet."""
    task = TASKS[args.task]
    done = [line["key"] for line in read_lines(args.results)]
    rows = ROWS if args.rows is None else [ROWS[index] for index in args.rows]
    rows = [row for row in rows if args.task in SHARED or "{shared}" not in row[3]]
    folder = os.path.join(args.work_dir, args.task)
    common = ["--model_name_or_path", args.model_dir, *task.common_flags(args.data_dir, folder)]
    for seed in args.seeds:
        for row in rows:
            settings = [*_settings(args.task, row), *args.more.split()]
            key = {"noise": row[0], "compression": row[2], "settings": " ".join(settings)}
            key["seed"] = seed
            if key in done:
                continue
            print(f"== {key}", flush=True)
            flags = [*common, *stored_as_measured(settings), "--seed", str(seed)]
            append_line(args.results, key, figures_of(task.run(task.parse(flags)), task.metric))
            shutil.rmtree(folder)


def table(lines: list[dict], task: RealTask) -> str:
    """Return a Markdown table: the metric before and after compression, for each seed.

    Raises:
        ValueError: if there are no runs.
    """
    if not lines:
        raise ValueError("--results has no finished run; run the benchmark without --table first")
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        key = line["key"]
        groups.setdefault((key["noise"], key["compression"], key["settings"]), []).append(line)
    seeds = sorted({line["key"]["seed"] for line in lines})
    text = [
        f"| noise | compression | {task.metric}, float32 | {task.metric}, compressed | by seed | "
        "MB | times smaller |",
        "|---|---|---|---|---|---|---|",
    ]
    for (noise, compression, _), group in groups.items():
        by_seed = {line["key"]["seed"]: task.score(line[task.metric]) for line in group}
        dense = statistics.mean(task.score(line[f"dense_{task.metric}"]) for line in group)
        each = " / ".join(f"{by_seed[seed]:.1f}" if seed in by_seed else "-" for seed in seeds)
        size = statistics.mean(line["bytes"] for line in group)
        times = group[0]["dense_bytes"] / size
        text.append(
            f"| {noise} | {compression} | {dense:.1f} | "
            f"{statistics.mean(by_seed.values()):.1f} | {each} | {size / 1e6:.3f} | {times:.1f} |"
        )
    counts = lines[-1]["examples"]
    text += [
        "",
        f"{counts['train']:,} training and {counts['validation']:,} validation examples; seeds "
        f"{', '.join(map(str, seeds))}.",
        *provenance(lines),
    ]
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(args=argv)
    if not args.table:
        run_all(args)
    print(table(read_lines(args.results), TASKS[args.task]))


if __name__ == "__main__":
    main()
