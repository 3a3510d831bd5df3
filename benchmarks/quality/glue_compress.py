#!/usr/bin/env python
"""Quality studies on GLUE: a finetuned MiniLM is compressed in several ways, with equal steps.

    python benchmarks/quality/glue_compress.py --study settings --tasks cola \\
      --data_dir ../shared/data

Each run begins with the float32 model that ``glue_float32.py`` trained with the same seed, which is
also the teacher. Settings are chosen by the held-out examples of the training file; dev is only
reported. Each finished run appends one line; runs that are there are skipped, and an interrupted
run continues from its newest checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import glue
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from glue_float32 import best_setting, folder_of
from glue_studies import STUDIES
from other_text import with_other_text
from random_tokens import RandomTokens
from remembered_teacher import RememberedTeacher
from results_file import append_line, line_of
from saved_allocation import saved_allocation
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    allocate_bits,
    count_lookups,
)

ALLOCATION_BATCHES = 4  # of 64 training examples


@dataclass
class Selection:
    """Selection of runs, and their float32 models."""

    data_dir: str = field(metadata={"help": "Folder with one folder per task."})
    start_results: str = field(
        default="benchmarks/results/glue_float32.jsonl",
        metadata={"help": "Rows of glue_float32.py."},
    )
    start_dir: str = field(
        default="benchmarks/runs/float32", metadata={"help": "Folder of the float32 models."}
    )
    tasks: list[str] = field(default_factory=lambda: list(glue.TASKS), metadata={"help": "Tasks."})
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "Seeds."})
    methods: list[str] | None = field(default=None, metadata={"help": "Only these methods."})
    sizes: list[str] | None = field(default=None, metadata={"help": "Only these sizes."})
    results: str = field(
        default="benchmarks/results/quality_glue.jsonl", metadata={"help": "One line per run."}
    )


@dataclass(kw_only=True)
class Arguments(Selection):
    """Study, selection of runs, and folders."""

    study: str = field(metadata={"help": f"One of {', '.join(STUDIES)}."})
    work_dir: str = field(
        default="benchmarks/runs/glue", metadata={"help": "Folder of the checkpoints of runs."}
    )


def start_of(args: Selection, task: str, seed: int) -> str:
    """Return the folder of the float32 model of a task and seed."""
    chosen = best_setting(args.start_results, task)
    return folder_of(args.start_dir, {"task": task, "seed": seed, **chosen})


def storage_of(key: dict, model: PreTrainedModel, train: Dataset, start: str) -> IPQConfig:
    """Return how a run stores its model; bits are allocated on training examples.

    The allocation is the same with and without noise.
    """
    setting = key["setting"]
    config = IPQConfig(seed=key["seed"], **setting["config"])
    if config.target is None:
        return config

    def allocate() -> IPQConfig:
        batches = glue.batches_of(train, start)
        lookups, few = count_lookups(model, batches), batches[:ALLOCATION_BATCHES]
        return allocate_bits(model, config, few, progress=False, lookups=lookups)

    data = {name: setting.get(name) for name in ("examples", "other_text", "half_of_layers")}
    return saved_allocation(start, [key["seed"], setting["config"], data], allocate)


def make_trainer(
    args: Arguments, key: dict, start: str, teacher: PreTrainedModel, folder: str
) -> tuple[QuantNoiseTrainer, IPQConfig]:
    """Return the trainer of a run, whose model is the float32 model, and how to store it."""
    seed, setting = key["seed"], key["setting"]
    train = glue.load(args.data_dir, start, key["task"]).train
    if limit := setting.get("examples"):
        train = train.shuffle(seed=0).select(range(min(limit, len(train))))
    length = len(train)
    if setting.get("other_text"):
        train = with_other_text(train, args.data_dir, start, key["task"])
    model = copy.deepcopy(teacher)
    if setting.get("half_of_layers"):
        keep_every_other_layer(model)
    config, noise = storage_of(key, model, train, start), None
    if "noise" in setting:
        noise = QuantNoiseConfig.matching(config, model, seed=seed, **setting["noise"])
    training = TrainingArguments(
        output_dir=folder, seed=seed, weight_decay=0.01,
        per_device_train_batch_size=setting.get("batch_size", 32),
        bf16=True, use_cpu=True, train_sampling_strategy="group_by_length", save_strategy="steps",
        save_steps=200, save_total_limit=1, logging_steps=1000, disable_tqdm=True,
        report_to="none", dataloader_pin_memory=False,
        warmup_steps=0.06, learning_rate=setting["learning_rate"],
        num_train_epochs=setting["noise_epochs"] * length / len(train),
    )  # fmt: skip
    if not setting.get("dropout", True):
        disable_dropout(model)
    if not setting.get("attention_dropout", True):
        disable_dropout(model, within=".attention.")
    tokenizer = AutoTokenizer.from_pretrained(start)
    collate = DataCollatorWithPadding(tokenizer)
    if setting.get("random_tokens"):
        collate = RandomTokens(collate, tokenizer)
    elif "distill_attention" not in setting["compression"]:
        teacher = RememberedTeacher(teacher)
    trainer = QuantNoiseTrainer(
        model,
        training,
        noise,
        teacher=teacher,
        compression_args=CompressionArguments(plots=False, **setting["compression"]),
        train_dataset=train,
        data_collator=collate,
    )
    return trainer, config


def disable_dropout(model: PreTrainedModel, within: str = "") -> None:
    """Set the probability of dropout to 0 in modules that have ``within`` in their name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and within in name:
            module.p = 0.0


def keep_every_other_layer(model: PreTrainedModel) -> None:
    """Remove the second, fourth and sixth layer of a MiniLM."""
    encoder = model.bert.encoder
    encoder.layer = encoder.layer[::2]
    model.config.num_hidden_layers = len(encoder.layer)


def figures_of_split(
    task: glue.Task, split: Dataset, start: str, teacher: PreTrainedModel, small: PreTrainedModel
) -> tuple[dict, dict, str]:
    """Return figures of the small model, those of its teacher, and 1 for each correct example."""
    expected, labels = glue.logits_of(teacher, split, start)
    return figures_of_logits(task, labels, expected, glue.logits_of(small, split, start)[0])


def figures_of_logits(
    task: glue.Task, labels: np.ndarray, expected: torch.Tensor, logits: torch.Tensor
) -> tuple[dict, dict, str]:
    """Return :func:`figures_of_split` of labels, logits of the teacher and of the small model."""
    log_p, log_q = F.log_softmax(expected, -1), F.log_softmax(logits, -1)
    figures = glue.scores(task, logits, labels) | {
        "divergence": F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item(),
        "agreement": (expected.argmax(-1) == logits.argmax(-1)).float().mean().item(),
    }
    correct = "".join(str(int(c)) for c in logits.argmax(-1).numpy() == labels)
    return figures, glue.scores(task, expected, labels), correct


def run(args: Arguments, key: dict) -> dict:
    """Compress one model; return its figures."""
    start = start_of(args, key["task"], key["seed"])
    teacher = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    torch.manual_seed(key["seed"])
    begun = time.monotonic()
    folder = os.path.join(args.work_dir, hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16])
    trainer, config = make_trainer(args, key, start, teacher, folder)
    trained = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    compressing = os.path.isdir(os.path.join(folder, "compression"))
    if key["setting"]["noise_epochs"]:
        trainer.train(resume_from_checkpoint=trained)
    small = trainer.compress(config, resume_from_checkpoint=compressing)
    packed = os.path.join(folder, "packed")
    small.save_pretrained(packed)
    figures = {
        "seconds": time.monotonic() - begun,  # of the process that finished the run
        "resumed": compressing or trained is not None,
        "steps": trainer.compression_history[-1]["step"],
        "bytes": weight_bytes(packed),
        "float32_bytes": weight_bytes(start),
    }
    small = AutoModelForSequenceClassification.from_pretrained(packed)
    shutil.rmtree(folder)
    data = glue.load(args.data_dir, start, key["task"])
    for name in ("held_out", "dev"):
        figures[name], figures[f"{name}_float32"], correct = figures_of_split(
            glue.TASKS[key["task"]], getattr(data, name), start, teacher, small
        )
        figures[f"{name}_correct"] = correct
    return figures


def weight_bytes(folder: str) -> int:
    """Return the size of the weight files in a folder."""
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for name in os.listdir(folder)
        if name.endswith(".safetensors")
    )


def run_missing(
    args: Selection,
    study: str,
    runs_of: Callable[[str], Iterable[tuple[str, str, dict]]],
    run: Callable[[Any, dict], dict],
) -> None:
    """Run what is selected and has no row yet; append a row each.

    Args:
        args: the selection.
        study: name of the study.
        runs_of: maps a task to the size, method and setting of each run.
        run: maps the arguments and the key of a run to its figures.
    """
    for seed in args.seeds:
        for task in args.tasks:
            for size, method, setting in runs_of(task):
                if args.methods is not None and method not in args.methods:
                    continue
                if args.sizes is not None and size not in args.sizes:
                    continue
                key = {
                    "study": study, "task": task, "model": "minilm", "method": method,
                    "size": size, "seed": seed, "setting": setting,
                }  # fmt: skip
                if line_of(args.results, key):
                    continue
                figures = run(args, key)
                append_line(args.results, key, figures)
                short = {n: v for n, v in figures.items() if not n.endswith("_correct")}
                print(task, size, method, seed, short, flush=True)


def main() -> None:
    """Run what is missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    run_missing(args, args.study, STUDIES[args.study], run)


if __name__ == "__main__":
    main()
