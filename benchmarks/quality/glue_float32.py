#!/usr/bin/env python
"""Float32 baselines of the quality studies: MiniLM finetuned on GLUE tasks.

Learning rate and number of epochs are chosen on held-out examples of the training file (seed 42),
then the other seeds are trained with the best setting.

    python benchmarks/quality/glue_float32.py --tasks rte mrpc cola sst2 \\
      --data_dir ../shared/data --model_dir ../shared/models/minilm

Each finished run appends one line to the results; runs that are already there are skipped. Models
of the best setting that are missing, for instance in a new clone, are trained again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, field

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import glue
import torch
from results_file import append_or_compare, line_of, read_lines
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

# Settings tried with this seed: (learning rate, epochs).
SEED = 42
SETTINGS = {
    "rte": ((2e-5, 6), (5e-5, 6), (1e-4, 6), (2e-4, 6)),
    "mrpc": ((5e-5, 5), (1e-4, 5), (2e-4, 5)),
    "cola": ((2e-5, 6), (3e-5, 6), (5e-5, 6), (1e-4, 6), (2e-4, 6)),
    "sst2": ((5e-5, 2), (1e-4, 2)),
}


@dataclass
class Arguments:
    """Selection of runs, and folders."""

    data_dir: str = field(metadata={"help": "Folder with one folder per task."})
    model_dir: str = field(metadata={"help": "Pretrained checkpoint."})
    tasks: list[str] = field(default_factory=lambda: list(glue.TASKS), metadata={"help": "Tasks."})
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44], metadata={"help": "Seeds."})
    results: str = field(
        default="benchmarks/results/glue_float32.jsonl", metadata={"help": "One line per run."}
    )
    work_dir: str = field(
        default="benchmarks/runs/float32", metadata={"help": "Folder of the finetuned models."}
    )


def folder_of(work_dir: str, key: dict) -> str:
    """Return the folder of a finetuned model."""
    return os.path.join(work_dir, "-".join(str(value) for value in key.values()))


def finetune(args: Arguments, key: dict) -> None:
    """Train one model and save it; append its row, or compare with the row that is there."""
    task = glue.TASKS[key["task"]]
    data = glue.load(args.data_dir, args.model_dir, task.name)
    train, seed = data.train, key["seed"]
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_dir, dtype=torch.float32, num_labels=2
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder, seed=seed, learning_rate=key["learning_rate"],
            num_train_epochs=key["epochs"], per_device_train_batch_size=32, warmup_steps=0.06,
            weight_decay=0.01, bf16=True, use_cpu=True, train_sampling_strategy="group_by_length",
            save_strategy="no", logging_steps=1000, disable_tqdm=True, report_to="none",
            dataloader_pin_memory=False,
        )  # fmt: skip
        collate = DataCollatorWithPadding(tokenizer)
        Trainer(model, training, train_dataset=train, data_collator=collate).train()
    figures = {"seconds": time.monotonic() - begun, "train_examples": len(train)}
    for name in ("held_out", "dev"):
        split = getattr(data, name)
        figures[name] = glue.scores(task, *glue.logits_of(model, split, args.model_dir))
    folder = folder_of(args.work_dir, key)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    append_or_compare(args.results, key, figures)
    print(key, figures, flush=True)


def best_setting(results: str, task: str) -> dict:
    """Return the setting of the first seed with the best metric on the held-out examples."""
    rows = [row for row in read_lines(results) if row["key"]["task"] == task]
    metric = glue.TASKS[task].metric_name
    rows = [row for row in rows if row["key"]["seed"] == rows[0]["key"]["seed"]]
    best = max(rows, key=lambda row: (row["held_out"][metric], -row["held_out"]["loss"]))
    return {name: best["key"][name] for name in ("learning_rate", "epochs")}


def main() -> None:
    """Run what is missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()

    for task in args.tasks:
        for rate, epochs in SETTINGS[task]:
            key = {"task": task, "seed": SEED, "learning_rate": rate, "epochs": epochs}
            if line_of(args.results, key) is None:
                finetune(args, key)
        for seed in args.seeds:
            key = {"task": task, "seed": seed, **best_setting(args.results, task)}
            if not os.path.isdir(folder_of(args.work_dir, key)):
                finetune(args, key)


if __name__ == "__main__":
    main()
