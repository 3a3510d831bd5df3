#!/usr/bin/env python
"""Float32 language models of the study: a Llama trained from scratch, and stories260K finetuned.

    python benchmarks/quality/language_model_float32.py --data_dir ../shared/data/wikitext2 \\
      --model llama --steps 4000 --work_dir benchmarks/runs/lm
    python benchmarks/quality/language_model_float32.py --data_dir ../shared/data/wikitext2 \\
      --model stories --model_dir ../shared/models/stories260K \\
      --learning_rate 3e-3 --weight_decay 0.01 --steps 1500 --work_dir benchmarks/runs/lm

An interrupted training is resumed from its newest checkpoint. Each finished one appends one line to
the results and is saved in ``--work_dir``; one that has a line is repeated if its model is missing.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import wikitext
from results_file import append_or_compare, line_of
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class Arguments:
    """Model, training and folders."""

    data_dir: str = field(metadata={"help": "Folder with train.txt and valid.txt."})
    model: Literal["llama", "stories"] = field(metadata={"help": "From scratch, or finetuned."})
    model_dir: str = field(default="", metadata={"help": "Pretrained stories260K."})
    layers: int | None = field(default=None, metadata={"help": "Layers that stories keeps."})
    ffn: int | None = field(default=None, metadata={"help": "FFN units that stories keeps."})
    steps: int = field(default=4000, metadata={"help": "Optimizer steps of 2,048 tokens."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak of the cosine schedule."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    bf16: bool = field(default=False, metadata={"help": "Train with bfloat16 autocast."})
    vocab_size: int = field(default=4096, metadata={"help": "Entries of the new tokenizer."})
    seed: int = field(default=42, metadata={"help": "Seed."})
    results_dir: str = field(
        default="benchmarks/results", metadata={"help": "Folder of quality_<study>.jsonl."}
    )
    work_dir: str = field(
        default="benchmarks/runs/lm", metadata={"help": "Folder of models and checkpoints."}
    )


def folder_of(work_dir: str, key: dict) -> str:
    """Return the folder of a trained model."""
    setting = key["setting"]
    return os.path.join(
        work_dir, f"{key['model']}-{setting['steps']}-{setting['learning_rate']}-{key['seed']}"
    )


def _start(args: Arguments, folder: str):
    """Return the untrained (or pretrained) model; its tokenizer is saved in the folder."""
    if args.model == "stories":
        tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
        model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
        if args.layers is not None and args.ffn is not None:
            model = wikitext.smaller_model(model, args.layers, args.ffn)
    else:
        tokenizer = wikitext.train_tokenizer(args.data_dir, args.vocab_size)
        model = wikitext.new_model(tokenizer)
    tokenizer.save_pretrained(folder)
    return model


def train(args: Arguments, key: dict) -> dict:
    """Train one model and save it; return its figures."""
    folder = folder_of(args.work_dir, key)
    checkpoints = os.path.join(folder, "checkpoints")
    os.makedirs(checkpoints, exist_ok=True)
    torch.manual_seed(args.seed)
    model = _start(args, folder)
    length = wikitext.length_of(args.model)
    texts = wikitext.load_texts(args.data_dir, folder, length)
    begun = time.monotonic()
    training = TrainingArguments(
        output_dir=checkpoints, seed=args.seed, learning_rate=args.learning_rate,
        max_steps=args.steps, per_device_train_batch_size=wikitext.BATCH_TOKENS // length,
        warmup_steps=0.05,
        lr_scheduler_type="cosine", weight_decay=args.weight_decay, adam_beta2=0.95,
        bf16=args.bf16, use_cpu=True, save_steps=300, save_total_limit=1, logging_steps=100,
        disable_tqdm=True, report_to="none", dataloader_pin_memory=False,
        per_device_eval_batch_size=16, eval_strategy="steps", eval_steps=500,
    )  # fmt: skip
    trainer = Trainer(
        model, training, train_dataset=texts.train.rows, eval_dataset=texts.held_out.rows,
        data_collator=default_data_collator,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints))
    figures = {"seconds": time.monotonic() - begun, "steps": trainer.state.global_step}
    figures["parameters"] = model.num_parameters()
    model.save_pretrained(folder)
    for name in ("held_out", "dev"):
        figures[name] = wikitext.evaluate(model, getattr(texts, name), None)
        losses = figures[name].pop("losses")
        if name == "dev":
            figures["dev_losses"] = losses
    figures["float32_bytes"] = os.path.getsize(os.path.join(folder, "model.safetensors"))
    print(key, {name: figures[name] for name in ("held_out", "dev")}, flush=True)
    shutil.rmtree(checkpoints)
    return figures


def main() -> None:
    """Train the model if it or its row is missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    is_part = args.layers is not None and args.ffn is not None
    key = {
        "study": "language_model_ablations" if is_part else "language_model",
        "task": "wikitext2",
        "model": f"{args.model}-{args.layers}x{args.ffn}" if is_part else args.model,
        "method": "float32",
        "size": None, "seed": args.seed,
        "setting": {
            "steps": args.steps, "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
        },
    }  # fmt: skip
    results = os.path.join(args.results_dir, f"quality_{key['study']}.jsonl")
    model = os.path.join(folder_of(args.work_dir, key), "model.safetensors")
    if not os.path.isfile(model) or line_of(results, key) is None:
        append_or_compare(results, key, train(args, key))


if __name__ == "__main__":
    main()
