#!/usr/bin/env python
"""SST-2 with several seeds: one shot, stages with labels, and stages with a teacher.

For each seed, a checkpoint is finetuned without noise and one with noise. Each is compressed in one
shot, in stages with labels only, and in stages with the dense model as teacher. All seeds train on
the same sentences. Each value is one run of ``examples/run_glue.py`` in this process. Compressed
models are evaluated after saving and loading.

    python benchmarks/glue_sst2.py --model_dir ../shared/models/minilm \\
      --data_dir ../shared/data/sst2
    python benchmarks/glue_sst2.py --table

Each finished run appends one line to ``--results``. Runs that are already there are skipped, so an
interrupted benchmark is resumed with the same command.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

from glue_sst2_table import table
from results_file import append_line, figures_of, read_lines  # adds the examples to sys.path
from transformers import HfArgumentParser

from hf_quantnoise.configuration.flags import parse_int_or_dict

from run_glue import parse, run  # isort: skip

# Compression of a checkpoint, as flags of run_glue.py. Stages use --stage_epochs in addition.
METHODS = {
    "one shot": ["--stage_epochs", "0"],
    "stages, labels only": ["--distill", "False"],
    "stages, teacher": ["--distill", "True"],
}


@dataclass
class BenchmarkArguments:
    """Selection of runs. The defaults are those of the table in the README."""

    model_dir: str = field(
        default="../shared/models/minilm", metadata={"help": "Pretrained checkpoint."}
    )
    data_dir: str = field(
        default="../shared/data/sst2",
        metadata={"help": "Folder with train.parquet and dev.parquet."},
    )
    results: str = field(
        default="benchmarks/results/glue_sst2.jsonl", metadata={"help": "One line per run."}
    )
    work_dir: str = field(
        default="benchmarks/runs/glue_sst2",
        metadata={"help": "Folder for finetuned checkpoints, which are kept."},
    )
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44], metadata={"help": "Seeds."})
    train_samples: int = field(
        default=10_000, metadata={"help": "Training sentences, the same ones for every seed."}
    )
    eval_samples: int | None = field(
        default=None, metadata={"help": "Dev sentences; default: all."}
    )
    noises: list[str] = field(
        default_factory=lambda: ["none", "proxy"],
        metadata={"help": "Noises, with one checkpoint each."},
    )
    noise_rate: float = field(default=0.1, metadata={"help": "p of the noise."})
    noise_block_size: str = field(default="8", metadata={"help": "Block size of the noise."})
    epochs: float = field(default=2.0, metadata={"help": "Epochs of finetuning."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of finetuning."})
    batch_size: int = field(default=32, metadata={"help": "Batch size of finetuning and stages."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens per sentence."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Methods, from {', '.join(METHODS)}."},
    )
    block_sizes: list[str] = field(
        default_factory=lambda: ["4", "ffn=8,embeddings=8,attention=4"],
        metadata={"help": "Block sizes of the compressed models, as in run_glue.py."},
    )
    n_centroids: str = field(
        default="256", metadata={"help": "Centroids per codebook, as in run_glue.py."}
    )
    stages: list[str] = field(
        default_factory=lambda: ["ffn", "embeddings", "attention"],
        metadata={"help": "Stages in order, as in run_glue.py."},
    )
    exclude_modules: str | None = field(
        default=None, metadata={"help": "Layers to skip, as in run_glue.py."}
    )
    codebook_bits: int = field(default=32, metadata={"help": "Bits of a stored centroid."})
    stage_epochs: float = field(default=1.0, metadata={"help": "Epochs after each stage."})
    stage_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the stages; default: --learning_rate."}
    )
    codebook_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of centroids; default: that of the stage."}
    )
    table: bool = field(
        default=False, metadata={"help": "Print the table of --results without running anything."}
    )
    keep: bool = field(default=False, metadata={"help": "Keep compressed models in --work_dir."})

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(
                    f"invalid --methods {method!r}: expected some of {', '.join(METHODS)}"
                )
        for blocks in self.block_sizes:
            parse_int_or_dict("block_sizes", blocks)


@dataclass(frozen=True)
class Job:
    """One run: the settings that identify it (the key), its folder and its flags."""

    key: dict
    folder: str
    flags: list[str]


def _shared_flags(args: BenchmarkArguments, seed: int) -> list[str]:
    flags = {
        "train_file": os.path.join(args.data_dir, "train.parquet"),
        "validation_file": os.path.join(args.data_dir, "dev.parquet"),
        "task_name": "sst2",
        "shuffle_train_dataset": True,
        "max_train_samples": args.train_samples,
        "max_eval_samples": args.eval_samples,
        "max_seq_length": args.max_seq_length,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": args.learning_rate,
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 100,
        "train_sampling_strategy": "group_by_length",  # halves the time: most sentences are short
        "dataloader_pin_memory": False,
        "metrics": "sklearn",
    }
    return _flags(flags)


def _flags(values: dict) -> list[str]:
    return [word for name, v in values.items() if v is not None for word in (f"--{name}", str(v))]


def _slug(*parts: object) -> str:
    text = "-".join(str(part) for part in parts)
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text)


def _noise_key(args: BenchmarkArguments, noise: str) -> dict:
    if noise == "none":
        return {"noise": "none"}
    return {
        "noise": noise,
        "noise_rate": args.noise_rate,
        "noise_block_size": args.noise_block_size,
    }


def _dense_job(args: BenchmarkArguments, seed: int, noise: str) -> Job:
    key = {
        "method": "float32",
        "seed": seed,
        "model": os.path.basename(os.path.normpath(args.model_dir)),
        "train_samples": args.train_samples,
        "eval_samples": args.eval_samples,
        "max_seq_length": args.max_seq_length,
        "epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        **_noise_key(args, noise),
    }
    # The folder's name has every setting, so that no checkpoint of other settings is used.
    folder = os.path.join(args.work_dir, _slug(*key.values()))
    flags = [
        *_shared_flags(args, seed),
        *_flags({**_noise_key(args, noise), "num_train_epochs": args.epochs}),
        *_flags({"model_name_or_path": args.model_dir, "output_dir": folder}),
        "--no_compress",
    ]
    return Job(key, folder, flags)


def _compressed_job(args: BenchmarkArguments, dense: Job, method: str, blocks: str) -> Job:
    staged = method != "one shot"
    stage = {
        "stage_epochs": args.stage_epochs,
        "stage_learning_rate": args.stage_learning_rate,
        "codebook_learning_rate": args.codebook_learning_rate,
    }
    target = {
        "block_size": blocks,
        "n_centroids": args.n_centroids,
        "codebook_bits": args.codebook_bits,
        "exclude_modules": args.exclude_modules,
    }
    key = {**dense.key, "method": method, **target, "stages": args.stages}
    key |= stage if staged else {}
    folder = os.path.join(dense.folder, _slug(method, blocks))
    flags = [
        *_shared_flags(args, dense.key["seed"]),
        *_flags({"model_name_or_path": os.path.join(dense.folder, "dense")}),
        *_flags({"output_dir": folder, "do_train": False, "leftover_bits": 32, **target}),
        *("--stages", *args.stages),
        *(_flags(stage) if staged else []),
        *METHODS[method],
    ]
    return Job(key, folder, flags)


def _run_job(job: Job, args: BenchmarkArguments) -> None:
    append_line(args.results, job.key, figures_of(run(parse(job.flags)), "accuracy"))


def _jobs(args: BenchmarkArguments) -> Iterator[tuple[Job, list[Job]]]:
    for seed in args.seeds:
        for noise in args.noises:
            dense = _dense_job(args, seed, noise)
            yield (
                dense,
                [
                    _compressed_job(args, dense, method, blocks)
                    for blocks in args.block_sizes
                    for method in args.methods
                ],
            )


def run_all(args: BenchmarkArguments) -> None:
    """Run everything that is not in the results file yet."""
    done = [line["key"] for line in read_lines(args.results)]
    for dense, jobs in _jobs(args):
        missing = [job for job in jobs if job.key not in done]
        checkpoint = os.path.join(dense.folder, "dense", "model.safetensors")
        if dense.key not in done or (missing and not os.path.isfile(checkpoint)):
            print(f"== {dense.key}", flush=True)
            _run_job(dense, args) if dense.key not in done else run(parse(dense.flags))
        for job in missing:
            print(f"== {job.key}", flush=True)
            _run_job(job, args)
            if not args.keep:
                shutil.rmtree(job.folder)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(args=argv)
    if not args.table:
        run_all(args)
    print(table(read_lines(args.results)))


if __name__ == "__main__":
    main()
