"""Overhead of noise: training steps with and without it, interleaved on one model.

A sample is the ratio of two steps with noise to two without (p = 0, which skips it), on the same
batch and in the order A B B A or B A A B, so that a drift of the machine affects both. Samples are
added until their quartiles are within 2 points, or for ``--seconds``. A base case (16 x 64 tokens,
float32) is measured for each noise, and one change at a time for some.

The first fit of codebooks and scales, and a refresh after training has moved each weight by about a
tenth of their standard deviation, are timed separately.

    python benchmarks/noise_overhead.py
    python benchmarks/noise_overhead.py --noise proxy int8 --settings base "batch 8" --seconds 60

Each case appends a line to ``--results``; those that are there are not measured again. The table
is written into docs/reference/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pages import add_page_arguments, fill_page
from results_file import append_line, provenance, read_lines
from transformers import BertConfig, BertForSequenceClassification

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.noise import find_state

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "noise_overhead.jsonl"
PAGE = ROOT / "docs" / "reference" / "performance.md"
SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256,
             "vocab_size": 2048},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}  # fmt: skip
TABLES = r".*embeddings.*"
WIDTH, MIN_SAMPLES = 0.02, 5


@dataclass(frozen=True)
class Noise:
    """A noise to measure.

    Attributes:
        options: of the config.
        tables: whether it is applied to embeddings too.
        goal: in percent of a step; None if there is none.
        varied: whether the changes of the base case are measured too.
    """

    options: dict
    tables: bool = False
    goal: float | None = None
    varied: bool = False


NOISES = {
    "proxy": Noise({"noise": "proxy"}, goal=3, varied=True),
    "proxy, tables too": Noise({"noise": "proxy"}, tables=True, goal=4),
    "pq": Noise({"noise": "pq"}, goal=6, varied=True),
    "pq, tables too": Noise({"noise": "pq"}, tables=True, goal=6),
    "pq, trained centroids, p=1": Noise({"noise": "pq", "p": 1.0, "learn_codebooks": True}),
    **{
        f"int{bits} {observer}": Noise(
            {"noise": f"int{bits}", "observer": observer},
            goal=6,
            varied=(bits, observer) == (8, "minmax"),
        )
        for bits in (8, 4)
        for observer in ("minmax", "channel", "histogram")
    },
}


@dataclass(frozen=True)
class Setting:
    """The base case of a training step, or one change of it."""

    batch: int = 16
    bf16: bool = False
    checkpointing: bool = False
    compiled: bool = False

    def forward(self, model: torch.nn.Module) -> Callable:
        """Return the forward of the model in this setting."""
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        return torch.compile(model) if self.compiled else model

    def autocast(self) -> AbstractContextManager:
        """Return the context of a forward."""
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()


SETTINGS = {
    "base": Setting(),
    "batch 8": Setting(batch=8),
    "batch 32": Setting(batch=32),
    "bf16 autocast": Setting(bf16=True),
    "gradient checkpointing": Setting(checkpointing=True),
    "torch.compile": Setting(compiled=True),
}


def make_model(shape: str, seed: int) -> BertForSequenceClassification:
    """Return a random BERT in training mode."""
    torch.manual_seed(seed)
    sizes = SHAPES[shape]
    config = BertConfig(**sizes, num_attention_heads=max(2, sizes["hidden_size"] // 32))
    return BertForSequenceClassification(config).train()


def make_step(model, setting: Setting, length: int, seed: int) -> Callable[[], float]:
    """Return a function that runs a training step (forward, backward, AdamW) and times it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.batch, length)
    ids = torch.randint(1000, model.config.vocab_size, shape, generator=generator)
    labels = torch.randint(2, (setting.batch,), generator=generator)
    parameters = [*model.parameters(), *find_state(model).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    forward = setting.forward(model)

    def step() -> float:
        start = time.perf_counter()
        with setting.autocast():
            loss = forward(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def ratios(step, set_rate, p: float, seconds: float) -> tuple[list[float], list[float]]:
    """Return the ratios of the times with and without noise, and the times without."""
    slowdowns: list[float] = []
    clean: list[float] = []
    for rate in (0.0, p, 0.0, p):  # warm up
        set_rate(rate)
        step()
    end = time.perf_counter() + seconds
    while True:
        spent: dict[float, float] = {0.0: 0.0, p: 0.0}
        for rate in (0.0, p, p, 0.0) if len(slowdowns) % 2 else (p, 0.0, 0.0, p):
            set_rate(rate)
            spent[rate] += step()
        slowdowns.append(spent[p] / spent[0.0])
        clean.append(spent[0.0] / 2)
        low, _, high = quartiles(slowdowns)
        settled = len(slowdowns) >= MIN_SAMPLES and high - low <= WIDTH
        if settled or (len(slowdowns) > 1 and time.perf_counter() > end):
            return slowdowns, clean


def quartiles(values: list[float]) -> list[float]:
    """Return the quartiles of some values."""
    return statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3


@torch.no_grad()
def drift(state) -> None:
    """Move each noised weight by a tenth of its standard deviation, as an epoch may do."""
    for weight in state.weights:
        tensor = weight.modules[0].weight
        tensor += 0.1 * tensor.std() * torch.randn_like(tensor)


def refresh_seconds(state) -> float:
    """Return the seconds of a refresh of codebooks and scales, after a drift."""
    drift(state)
    start = time.perf_counter()
    state.refresh_codebooks()
    state.refresh_scales()
    return time.perf_counter() - start


def measure(name: str, args: argparse.Namespace, keys: dict[str, dict]) -> None:
    """Measure a noise in some settings (name -> key of the line), and append a line for each."""
    noise, model = NOISES[name], make_model(args.shape, args.seed)
    config = QuantNoiseConfig(
        **{"p": args.p, "exclude_modules": None if noise.tables else TABLES, "seed": args.seed}
        | noise.options
    )
    start = time.perf_counter()
    apply_quant_noise(model, config)
    figures = {"fit": time.perf_counter() - start}
    state = find_state(model)
    figures |= {"refresh": refresh_seconds(state), "p": config.p}
    for setting, key in keys.items():
        step = make_step(model, SETTINGS[setting], args.length, args.seed)
        slowdowns, clean = ratios(step, partial(setattr, state, "p"), config.p, args.seconds)
        figures |= {"quartiles": quartiles(slowdowns), "samples": len(slowdowns)}
        append_line(args.results, key, figures | {"step": statistics.median(clean)})
        print(f"{name}, {setting}: {figures['quartiles'][1]:.3f}", flush=True)


def intervals(name: str) -> list[int]:
    """Return after how many steps a noise is refreshed by default; for trained codes also 20."""
    options = NOISES[name].options
    config = QuantNoiseConfig(**options)
    if options["noise"].startswith("int"):
        return [config.scale_update_steps]
    return [1, 20] if config.learn_codebooks else []


def table(lines: list[dict]) -> str:
    """Return the results as a Markdown table, the settings of a noise one after the other."""
    text = [
        "| noise | setting | overhead, median | quartiles | samples | goal | with refreshes "
        "| step without noise, ms | first fit, s | refresh, s |",
        "|---" * 10 + "|",
    ]
    order = list(NOISES)
    for line in sorted(lines, key=lambda line: order.index(line["key"]["noise"])):
        key = line["key"]
        low, middle, high = (100 * (ratio - 1) for ratio in line["quartiles"])
        goal = NOISES[key["noise"]].goal
        share = 100 * line["refresh"] / line["step"]
        every = [f"{middle + share / n:+.1f}% (every {n})" for n in intervals(key["noise"])]
        cells = [key["noise"], key["setting"], f"{middle:+.1f}%", f"{low:+.1f}% to {high:+.1f}%"]
        cells += [str(line["samples"]), f"{goal:g}%" if goal else "", ", ".join(every)]
        cells += [f"{1000 * line['step']:.0f}", f"{line['fit']:.2f}", f"{line['refresh']:.2f}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", "\n\n".join(provenance(lines))])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--noise", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--p", type=float, default=0.1, help="rate of noises without their own")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=16, help="of the samples of a case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    add_page_arguments(parser, RESULTS, PAGE)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    done = [line["key"] for line in read_lines(args.results)]
    for name in args.noise:
        keys = {}
        for setting in args.settings if NOISES[name].varied else ["base"]:
            key = {"noise": name, "setting": setting}
            key |= {each: getattr(args, each) for each in ("shape", "p", "length", "seconds")}
            key |= {"threads": args.threads, "seed": args.seed}
            if key not in done:
                keys[setting] = key
        if keys:
            measure(name, args, keys)
    lines = read_lines(args.results)
    fill_page(args.page, noise=table(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
