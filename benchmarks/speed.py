"""Speed of packed models, as a multiple of the speed of the dense float32 model.

The variants of a case run in turn, in alternating order, so that a drift of the machine affects all
of them; ratios are medians over the rounds. Weights are random, since time does not depend on them.

    python benchmarks/speed.py --threads 1 2                                # measure and print
    python benchmarks/speed.py --table --page docs/how_to/speed.md          # write the tables there

Each case appends a line to ``--results``. Cases that are already there are not measured again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from pages import add_table_arguments, show
from results_file import append_line, provenance, read_lines
from speed_models import BASE, FORMS, Subject, cases, tensors_of, torch_int8, variants
from torch import nn

from hf_quantnoise import optimize_for_inference

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "speed.jsonl")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# A run of a few microseconds is repeated for this time, in seconds.
SHORTEST = 0.01


@torch.inference_mode()
def measure(
    subject: Subject, models: dict[str, nn.Module], repetitions: int, clock: Callable[[], float]
) -> dict:
    """Return the time and the speed relative to the dense model, with quartiles, by variant."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    number = {}
    for name, model in models.items():
        subject.run(model)  # warm up
        start = clock()
        subject.run(model)
        number[name] = max(1, int(SHORTEST / (clock() - start)))
    for repetition in range(repetitions):
        for name in list(models) if repetition % 2 else reversed(list(models)):
            start = clock()
            for _ in range(number[name]):
                subject.run(models[name])
            seconds[name].append((clock() - start) / number[name] / subject.per_run)
    figures = relative_speeds(seconds)
    for name, own in figures.items():
        own["bytes"] = sum(t.nbytes for t in tensors_of(models[name]))
    return figures


def relative_speeds(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Return the median time and the speed relative to the dense model, with quartiles.

    Args:
        seconds: variant -> times of its rounds.
    """
    figures = {}
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds[BASE], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        figures[name] = {
            "ms": 1000 * statistics.median(times),
            "speed": middle,
            "quartiles": [low, high],
        }
    return figures


@torch.no_grad()
def load_seconds(models: dict[str, nn.Module], repetitions: int) -> dict[str, float]:
    """Return the seconds to load and optimize each variant that ``from_pretrained`` loads."""
    ways: dict[str, tuple[str, Callable | None]] = {
        BASE: (BASE, None),
        "packed": ("packed", None),
        "torch dynamic int8": (BASE, torch_int8),
        **{
            f'optimized, "{form}"': ("packed", partial(optimize_for_inference, form=form))
            for form in FORMS
        },
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for name in (BASE, "packed"):
            models[name].save_pretrained(os.path.join(folder, name))
        for _ in range(repetitions):
            for name, (saved, then) in ways.items():
                start = time.perf_counter()
                model = type(models[saved]).from_pretrained(os.path.join(folder, saved)).eval()
                if then is not None:
                    then(model)
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def run_all(args: argparse.Namespace) -> None:
    """Measure every case that is not in the results file yet."""
    done = [line["key"] for line in read_lines(args.results)]
    for threads in args.threads:
        torch.set_num_threads(threads)
        for label, make in cases(args.case).items():
            key = {"case": label, "threads": threads, "clock": args.clock,
                   "repetitions": args.repetitions, "seed": args.seed}  # fmt: skip
            if key in done:
                continue
            torch.manual_seed(args.seed)
            subject = make()
            models = variants(subject, args.seed)
            figures = {"variants": measure(subject, models, args.repetitions, CLOCKS[args.clock])}
            if "1x" in label:
                figures["load"] = load_seconds(models, min(args.repetitions, 5))
            append_line(args.results, key, figures)
            print(f"{label}, {threads} threads: done", flush=True)


def table(lines: list[dict]) -> str:
    """Return the results as Markdown tables: speed by case, then memory, load time and speed.

    Raises:
        ValueError: if there are none.
    """
    if not lines:
        raise ValueError("--results has no finished case; run the benchmark without --table first")
    names = list(lines[0]["variants"])
    text = []
    for threads in sorted({line["key"]["threads"] for line in lines}):
        rows = [line for line in lines if line["key"]["threads"] == threads]
        text += [f"Speed relative to dense float32, {threads} thread{'s' * (threads > 1)}:", ""]
        text += [
            f"| case | {BASE}, ms | {' | '.join(names[1:])} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for line in rows:
            found = line["variants"]
            cells = [f"{found[name]['speed']:.2f}" if name in found else "-" for name in names[1:]]
            text.append(
                f"| {line['key']['case']} | {found[BASE]['ms']:.3g} | {' | '.join(cells)} |"
            )
        text.append("")
    loaded = next((line for line in lines if "load" in line), None)
    if loaded:
        text += [f"Memory, load time and speed of {loaded['key']['case']}:", ""]
        text += ["| variant | memory, MB | load, s | speed |", "|---|---|---|---|"]
        for name, found in loaded["variants"].items():
            load = f"{loaded['load'][name]:.2f}" if name in loaded["load"] else "-"
            text.append(f"| {name} | {found['bytes'] / 1e6:.1f} | {load} | {found['speed']:.2f} |")
        text.append("")
    return "\n".join([*text, *provenance(lines)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = ["linear", "minilm", "gpt2", "tiny"]
    parser.add_argument("--case", nargs="+", choices=choices, default=choices[:3])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=15, help="rounds over all variants")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    add_table_arguments(parser, RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    if not args.table:
        run_all(args)
    show(args, "speed", table(read_lines(args.results)))


if __name__ == "__main__":
    main()
