"""Learning rates of examples/demo.py, chosen on training digits that are held out.

    python benchmarks/demo_rates.py

Trains the demo's models with each pair of rates on 1150 digits and scores them on 287 others; the
test digits of the demo are not used. Each run appends a line to ``--results``; those that are there
are not repeated. The table is written into docs/reference/measurements.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from pages import add_page_arguments, fill_page
from results_file import append_line, provenance, read_lines  # puts examples/ on the path

# isort: split
import demo

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo_rates.jsonl"
PAGE = ROOT / "docs" / "reference" / "measurements.md"
NO_NOISE, NOISE, ONE_SHOT = "no noise, finetuned", "noise, one shot", "no noise, one shot"
# Rates of weights and of centroids.
PAIRS = [(2e-4, 2e-3), (5e-4, 2e-3), (1e-3, 2e-3)]
RUNS = [("float32", None), (ONE_SHOT, None), *((n, p) for p in PAIRS for n in (NO_NOISE, NOISE))]


def measure(trainings: demo.Demo, dense, name: str, pair: tuple[float, float] | None) -> dict:
    """Return size, metrics and time of a model."""
    start = time.perf_counter()
    if name == "float32":
        model = dense
    elif pair is None:
        model = trainings.one_shot(dense)
    elif name == NOISE:
        model = trainings.with_noise(dense, rates=demo.Rates(*pair))
    else:
        model = trainings.finetuned(dense, demo.Rates(*pair))
    seconds = time.perf_counter() - start
    row = demo.saved_and_scored(trainings, name, model)
    return {"accuracy": row.score, "loss": row.more[0], "mb": row.megabytes, "seconds": seconds}


def table(lines: list[dict]) -> str:
    """Return the results as a Markdown table, with mean and spread over seeds."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        key = line["key"]
        pair = key["rates"] and tuple(key["rates"])
        groups.setdefault((key["model"], pair), []).append(line)
    text = ["| model | rates of weights, centroids | seeds | accuracy | loss | MB |"]
    text.append("|---|---|---|---|---|---|")
    for (name, pair), own in groups.items():
        cells = [name, ", ".join(f"{rate:g}" for rate in pair or ()), str(len(own))]
        for metric, form in (("accuracy", ".4f"), ("loss", ".3f")):
            values = [line[metric] for line in own]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        cells.append(f"{own[0]['mb']:.3f}")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", "\n\n".join(provenance(lines))])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    add_page_arguments(parser, RESULTS, PAGE)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    torch.set_num_threads(1)
    done = [line["key"] for line in read_lines(args.results)]
    for seed in args.seeds:
        options = demo.parse_arguments(["--seed", str(seed)])
        options.output_dir = args.output_dir
        trainings, dense = demo.Demo(options, *demo.load_data(held_out=True)), None
        for name, pair in RUNS:
            key = {"model": name, "rates": pair and list(pair), "seed": seed}
            key |= {"epochs": options.epochs, "compression_epochs": options.compression_epochs}
            if key not in done:
                dense = dense if dense is not None else trainings.float32()
                append_line(args.results, key, measure(trainings, dense, name, pair))
    lines = read_lines(args.results)
    fill_page(args.page, demo=table(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
