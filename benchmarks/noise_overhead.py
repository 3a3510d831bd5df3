"""Overhead of noise: training steps with and without it, interleaved on one model.

Each pair of steps runs the same batch with noise off (p = 0, which skips it) and on, in alternating
order, so that a drift of the machine affects both. The table shows the median and the quartiles of
the ratios. Differences of a few percent need many repetitions on an idle machine. The first fit of
codebooks and scales, and a refresh (once per epoch or every few steps) after training has moved
each weight by about a tenth of their standard deviation, are timed separately, in CPU time.

    python benchmarks/noise_overhead.py --shape minilm --repetitions 25
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise, remove_quant_noise
from hf_quantnoise.noise import find_state

SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}
TABLES = r".*embeddings.*"


@dataclass(frozen=True)
class Case:
    """One row of the table: a noise, and whether it is applied to embeddings too."""

    noise: str
    p: float
    tables: bool
    observer: str = "minmax"

    @property
    def label(self) -> str:
        observer = f" {self.observer}" if self.observer != "minmax" else ""
        where = ", tables too" if self.tables else ", linear layers"
        return f"{self.noise}{observer} p={self.p:g}{where}"


def make_model(shape: str, seed: int) -> BertForSequenceClassification:
    """Return a random BERT in training mode."""
    torch.manual_seed(seed)
    sizes = SHAPES[shape]
    config = BertConfig(**sizes, num_attention_heads=max(2, sizes["hidden_size"] // 32))
    return BertForSequenceClassification(config).train()


def make_step(model, batch: int, length: int, seed: int):
    """Return a function that runs a training step (forward, backward, AdamW) and times it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, model.config.vocab_size, (batch, length), generator=generator)
    labels = torch.randint(2, (batch,), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def ratios(step, state, p: float, repetitions: int) -> tuple[list[float], list[float]]:
    """Return the ratio of the times with and without noise of each pair, and those without."""
    slowdowns, clean = [], []
    for rate in (0.0, p):  # warm up
        state.p = rate
        step()
    for repetition in range(repetitions):
        seconds = {}
        for rate in (0.0, p) if repetition % 2 else (p, 0.0):
            state.p = rate
            seconds[rate] = step()
        slowdowns.append(seconds[p] / seconds[0.0])
        clean.append(seconds[0.0])
    return slowdowns, clean


@torch.no_grad()
def drift(state) -> None:
    """Move each noised weight by a tenth of its standard deviation, as an epoch may do."""
    for weight in state.weights:
        tensor = weight.modules[0].weight
        tensor += 0.1 * tensor.std() * torch.randn_like(tensor)


def measure(case: Case, args: argparse.Namespace) -> str:
    """Return one row of the table."""
    model = make_model(args.shape, args.seed)
    config = QuantNoiseConfig(
        noise=case.noise,
        p=case.p,
        block_size=args.block_size,
        observer=case.observer,
        exclude_modules=None if case.tables else TABLES,
        seed=args.seed,
    )
    start = time.process_time()
    apply_quant_noise(model, config)
    fit = time.process_time() - start
    state = find_state(model)
    step = make_step(model, args.batch, args.length, args.seed)
    slowdowns, clean = ratios(step, state, case.p, args.repetitions)
    drift(state)
    start = time.process_time()
    state.refresh_codebooks()
    state.refresh_scales()
    refresh = time.process_time() - start
    remove_quant_noise(model)
    low, middle, high = (100 * (q - 1) for q in statistics.quantiles(slowdowns, n=4))
    return (
        f"| {case.label} | {middle:+.1f}% | {low:+.1f}% to {high:+.1f}% | "
        f"{1000 * statistics.median(clean):.1f} | {fit:.2f} | {refresh:.2f} |"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--noise", nargs="+", default=["proxy", "pq", "int8", "int4"])
    parser.add_argument("--observer", nargs="+", default=["minmax"], help="observers of intN noise")
    parser.add_argument("--p", type=float, default=0.1, help="rate of the noise, above 0")
    parser.add_argument("--block_size", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=25, help="pairs of steps, at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure each noise without and with embeddings, and print a Markdown table."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    command = sys.argv[1:] if arguments is None else arguments
    print(f"`python benchmarks/noise_overhead.py {' '.join(command)}`".replace(" `", "`"))
    machine = platform.processor() or platform.machine()
    print(
        f"\nseed {args.seed}, {args.threads} threads, {machine}, "
        f"torch {torch.__version__}; {args.shape}, {args.batch} x {args.length} tokens, AdamW, "
        f"{args.repetitions} interleaved pairs\n"
    )
    print(
        "| noise | step time, median | quartiles | clean step (ms) | fit, CPU s | refresh, CPU s |"
    )
    print("|---|---|---|---|---|---|")
    for noise in args.noise:
        for observer in args.observer if noise.startswith("int") else ["minmax"]:
            for tables in (False, True):
                print(measure(Case(noise, args.p, tables, observer), args), flush=True)


if __name__ == "__main__":
    main()
