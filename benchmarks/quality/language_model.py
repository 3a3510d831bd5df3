#!/usr/bin/env python
"""Language models on WikiText-2: compressed with and without noise, in the same number of steps.

    python benchmarks/quality/language_model.py --study language_model --model stories \\
      --data_dir ../shared/data/wikitext2 --start_dir benchmarks/runs/lm/stories-1500-0.003-42

Every row starts from the float32 model of ``language_model_float32.py``, which is also the teacher,
and takes ``steps`` optimizer steps in all: those with noise (or without, before compression) plus
those of the compression. Settings are chosen with ``--study language_model_settings`` on the
held-out articles. Each finished run appends one line to the results; runs that are already there
are skipped.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import wikitext
from language_model_ablations import ablations
from language_model_rows import Row, main_study, settings
from results_file import append_line, line_of
from saved_allocation import saved_allocation
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    default_data_collator,
)

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    allocate_bits,
)

STUDIES = {
    "language_model": main_study,
    "language_model_settings": settings,
    "language_model_ablations": ablations,
}


@dataclass
class Arguments:
    """Selection of runs, and folders."""

    study: str = field(metadata={"help": f"One of {', '.join(STUDIES)}."})
    model: str = field(metadata={"help": "llama, stories, or a part: stories-3x172."})
    data_dir: str = field(metadata={"help": "Folder with train.txt and valid.txt."})
    start_dir: str = field(metadata={"help": "Folder of the float32 model."})
    seeds: list[int] = field(default_factory=lambda: [42], metadata={"help": "Seeds."})
    rows: list[str] | None = field(default=None, metadata={"help": "Only these rows."})
    sizes: list[str] | None = field(default=None, metadata={"help": "Only these sizes."})
    steps: int | None = field(default=None, metadata={"help": "Steps, if not those of the study."})
    bf16: bool = field(default=False, metadata={"help": "Train with bfloat16 autocast."})
    results_dir: str = field(
        default="benchmarks/results", metadata={"help": "Folder of quality_<study>.jsonl."}
    )


def _configs(row: Row, model: PreTrainedModel, texts: wikitext.Texts, start: str):
    """Return the noise (or None) and how the model is stored."""
    stored = dict(row.stored)
    if stored.pop("scheme", "ipq") == "fixed_point":
        config = FixedPointConfig(**stored)
    else:
        config = IPQConfig(**stored)

    def allocate() -> IPQConfig:
        ids = torch.tensor(texts.train.rows[:64]["input_ids"])
        batches = [{"input_ids": part, "labels": part} for part in ids.split(16)]
        return allocate_bits(copy.deepcopy(model), config, batches, progress=False)

    if config.target is not None:
        config = saved_allocation(start, [row.stored], allocate)
    if row.noise is None:
        return None, config
    return QuantNoiseConfig.matching(config, model, **row.noise), config


def train_and_compress(args: Arguments, row: Row, seed: int, texts, model, teacher, folder):
    """Return the compressed model, and its optimizer steps."""
    noise, config = _configs(row, model, texts, args.start_dir)
    n_stages = len(config.stage_groups({"ffn", "attention", "embeddings"})) if row.staged else 1
    batch_size = wikitext.BATCH_TOKENS // wikitext.length_of(args.model)
    trainer = QuantNoiseTrainer(
        model,
        TrainingArguments(
            output_dir=folder, seed=seed, per_device_train_batch_size=batch_size,
            max_steps=max(row.noise_steps, 1), learning_rate=row.learning_rate, adam_beta2=0.95,
            warmup_steps=0.05, lr_scheduler_type="cosine", weight_decay=0.01, bf16=args.bf16,
            use_cpu=True, save_strategy="no", logging_steps=1000, disable_tqdm=True,
            report_to="none", dataloader_pin_memory=False,
        ),
        noise,
        teacher=teacher if row.distilled else None,
        compression_args=CompressionArguments(
            plots=False, stage_steps=round(row.compression_steps / n_stages),
            codebook_learning_rate=row.codebook_learning_rate,
        ),
        train_dataset=texts.train.rows,
        data_collator=default_data_collator,
    )  # fmt: skip
    if row.noise_steps:
        trainer.train()
    small = trainer.compress(config, teacher=teacher)
    return small, trainer.compression_history[-1]["step"]


def run(args: Arguments, row: Row, seed: int, texts: wikitext.Texts) -> dict:
    """Compress one model; return its figures."""
    model = AutoModelForCausalLM.from_pretrained(args.start_dir, dtype=torch.float32)
    teacher = copy.deepcopy(model)
    float32_bytes = os.path.getsize(os.path.join(args.start_dir, "model.safetensors"))
    torch.manual_seed(seed)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        small, steps = train_and_compress(args, row, seed, texts, model, teacher, folder)
        small.save_pretrained(folder)
        size = os.path.getsize(os.path.join(folder, "model.safetensors"))
        small = AutoModelForCausalLM.from_pretrained(folder)
    figures = {
        "seconds": time.monotonic() - begun,
        "steps": steps,
        "bytes": size,
        "float32_bytes": float32_bytes,
    }
    for name in row.splits:
        text = getattr(texts, name)
        figures[name] = wikitext.evaluate(small, text, teacher)
        losses = figures[name].pop("losses")
        figures[f"{name}_float32"] = wikitext.float32_scores(args.start_dir, teacher, name, text)
        if name == "dev":
            figures["dev_losses"] = losses
    return figures


def main() -> None:
    """Run what is missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    results = os.path.join(args.results_dir, f"quality_{args.study}.jsonl")
    texts = wikitext.load_texts(args.data_dir, args.start_dir, wikitext.length_of(args.model))
    for row in STUDIES[args.study](args.model, args.steps):
        if args.rows is not None and row.method not in args.rows:
            continue
        if args.sizes is not None and row.size not in args.sizes:
            continue
        for seed in args.seeds:
            key = {
                "study": args.study, "task": "wikitext2", "model": args.model, "method": row.method,
                "size": row.size, "seed": seed, "setting": row.setting(),
            }  # fmt: skip
            if line_of(results, key):
                continue
            figures = run(args, row, seed, texts)
            append_line(results, key, figures)
            shown = {name: figures[name] for name in ("seconds", "bytes", *row.splits)}
            print(row.method, row.size, seed, shown, flush=True)


if __name__ == "__main__":
    main()
