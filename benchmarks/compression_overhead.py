"""Time of a compression run beside plain finetuning of as many optimizer steps, by parts.

A random MiniLM shape is finetuned on random tokens, then compressed in three stages, with a teacher
and with the noise kept on the layers of later stages. Both write their checkpoints.

    python benchmarks/compression_overhead.py

Each repetition, with another seed, appends a line to ``--results``; those that are there are not
measured again. The table is written into docs/reference/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from pages import add_page_arguments, fill_page
from results_file import append_line, provenance, read_lines
from timed import timed
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig, QuantNoiseTrainer
from hf_quantnoise.compression.checkpoints import StageCheckpoints
from hf_quantnoise.compression.distillation.teacher import Teacher
from hf_quantnoise.modeling.packed import PackedLayer
from hf_quantnoise.modeling.packer import ModelPacker
from hf_quantnoise.noise.operator import WeightNoise
from hf_quantnoise.quantizers import ProductQuantizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compression_overhead.jsonl"
PAGE = ROOT / "docs" / "reference" / "performance.md"
SHAPES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64, "vocab_size": 512},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
               "intermediate_size": 1536},
}  # fmt: skip
STAGES = 3
# Part -> functions; the rest of the time is that of the student's steps.
PARTS = {
    "k-means": [(ProductQuantizer, "fit")],
    "assignment of the blocks": [(ProductQuantizer, "encode")],
    "rest of packing": [(ModelPacker, "pack_stage"), (ModelPacker, "pack_leftovers")],
    "teacher's forward": [(Teacher, "outputs")],
    "decoding of packed weights": [(PackedLayer, "decode_rows")],
    "noise": [(WeightNoise, "noisy_weight"), (WeightNoise, "noisy_rows")],
    "saving": [(StageCheckpoints, "save_stage"), (Trainer, "_save_checkpoint")],
}
STEPS = "steps: forward, backward, optimizer"


def examples(args: argparse.Namespace, seed: int) -> list[dict]:
    """Return random tokens with labels."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = SHAPES[args.shape].get("vocab_size", 30522)
    shape = (4 * args.batch, args.length)
    ids = torch.randint(5, vocabulary, shape, generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]


def split(total: float, parts: dict[str, float]) -> dict[str, float]:
    """Return the parts and the rest of the time."""
    return {**parts, STEPS: total - sum(parts.values())}


def measure(args: argparse.Namespace, seed: int) -> dict:
    """Return the seconds of both by parts, plain finetuning first."""
    torch.manual_seed(seed)
    data = examples(args, seed)
    model = BertForSequenceClassification(BertConfig(**SHAPES[args.shape]))
    noise = QuantNoiseConfig(noise="proxy", p=0.1)
    config = IPQConfig(n_centroids=16 if args.shape == "tiny" else 256, seed=seed)
    compression = CompressionArguments(stage_steps=args.stage_steps, keep_noise=True)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=args.batch, max_steps=STAGES * args.stage_steps,
            learning_rate=1e-5, save_steps=args.stage_steps, save_total_limit=1, report_to=[],
            disable_tqdm=True, logging_strategy="no", seed=seed, use_cpu=True,
        )  # fmt: skip
        with timed(PARTS) as parts:
            start = time.perf_counter()
            Trainer(model, settings, train_dataset=data).train()
            figures["plain"] = split(time.perf_counter() - start, parts)
        trainer = QuantNoiseTrainer(model, settings, noise, train_dataset=data)
        with timed(PARTS) as parts:
            start = time.perf_counter()
            trainer.compress(config, compression)
            figures["compression"] = split(time.perf_counter() - start, parts)
    return figures


def table(lines: list[dict]) -> str:
    """Return the results as Markdown tables, with medians over seeds."""
    text = []
    settings: dict[str, list[dict]] = {}
    for line in lines:
        key = {name: value for name, value in line["key"].items() if name != "seed"}
        settings.setdefault(str(key), []).append(line)
    for own in settings.values():
        key, medians = own[0]["key"], medians_of(own)
        plain = sum(medians["plain"].values())
        text += [
            f"{key['shape']}, {STAGES} stages of {key['stage_steps']} steps with "
            f"{key['batch']} x {key['length']} tokens, threads: {key['threads']}, runs: {len(own)}",
            "",
            "| part | plain finetuning, s | compression run, s | % of plain finetuning |",
            "|---|---|---|---|",
        ]
        for part in medians["plain"]:
            cells = [medians[arm][part] for arm in ("plain", "compression")]
            more = 100 * (cells[1] - cells[0]) / plain
            text.append(f"| {part} | {cells[0]:.1f} | {cells[1]:.1f} | {more:+.1f} |")
        total = sum(medians["compression"].values())
        more = 100 * (total - plain) / plain
        text += [f"| all | {plain:.1f} | {total:.1f} | {more:+.1f} |", ""]
    return "\n".join([*text, "\n\n".join(provenance(lines))])


def medians_of(lines: list[dict]) -> dict[str, dict[str, float]]:
    """Return the median seconds of each part of both arms."""
    return {
        arm: {part: statistics.median(x[arm][part] for x in lines) for part in lines[0][arm]}
        for arm in ("plain", "compression")
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--stage_steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_page_arguments(parser, RESULTS, PAGE)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    done = [line["key"] for line in read_lines(args.results)]
    names = ("shape", "stage_steps", "batch", "length", "threads")
    for seed in args.seeds:
        key = {name: getattr(args, name) for name in names} | {"seed": seed}
        if key not in done:
            append_line(args.results, key, measure(args, seed))
    lines = read_lines(args.results)
    fill_page(args.page, compression=table(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
