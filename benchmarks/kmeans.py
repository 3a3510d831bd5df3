"""k-means beside that of faiss, and its time against the number of blocks, and of centroids.

Both run from scratch on all points, in turn and with the same number of threads. Values of weights
follow Student's t distribution with 5 degrees of freedom, as heavy-tailed as those of real models.

    pip install faiss-cpu
    python benchmarks/kmeans.py
    python benchmarks/kmeans.py --parts scaling     # without faiss

Each case and seed appends a line to ``--results``; those that are there are not measured again. The
tables are written into docs/reference/performance.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from pages import add_page_arguments, fill_page
from results_file import append_line, provenance, read_lines
from torch import Tensor

from hf_quantnoise.quantizers.assignment import assign
from hf_quantnoise.quantizers.kmeans import kmeans

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kmeans.jsonl"
PAGE = ROOT / "docs" / "reference" / "performance.md"
# Name -> (rows, columns, block size): layers of MiniLM and RoBERTa-base, and MiniLM's words.
CASES = {
    "384 x 1536, blocks of 4": (384, 1536, 4),
    "768 x 3072, blocks of 4": (768, 3072, 4),
    "30522 x 384, blocks of 8": (30522, 384, 8),
}
# Of the part "scaling": blocks of 8, with one number varied and the other fixed.
BLOCKS, CENTROIDS = [2**n for n in range(16, 21)], [2**n for n in range(6, 11)]
PARTS = ("faiss", "scaling")
FIXED = {"n_blocks": 2**17, "n_centroids": 256}


def blocks_of(case: str, seed: int) -> Tensor:
    """Return the blocks of a random weight, shape (N, block size)."""
    return random_blocks(*CASES[case], seed)


def random_blocks(rows: int, columns: int, block_size: int, seed: int) -> Tensor:
    """Return the blocks of a random weight, shape (rows * columns / block size, block size)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weight = torch.distributions.StudentT(5.0).sample((rows, columns))
    return 0.05 * weight.view(-1, block_size)


def faiss_kmeans(points: Tensor, n_centroids: int, n_iter: int, seed: int) -> Tensor:
    """Return the centroids that faiss finds on all points."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    trained = faiss.Kmeans(
        points.shape[1],
        n_centroids,
        niter=n_iter,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    trained.train(points.numpy())
    return torch.from_numpy(trained.centroids)


def own_kmeans(points: Tensor, n_centroids: int, n_iter: int, seed: int) -> Tensor:
    """Return the centroids that this package finds."""
    return kmeans(points, n_centroids, n_iter=n_iter, seed=seed)[0]


def objective(points: Tensor, centroids: Tensor) -> float:
    """Return the mean squared distance to the nearest centroid."""
    decoded = centroids[assign(points, centroids)]
    return float((points - decoded).square().sum(1).mean(dtype=torch.float64))


def measure(case: str, seed: int, args: argparse.Namespace) -> dict:
    """Return the median times of both, wall clock and CPU, and their objectives."""
    points = blocks_of(case, seed)
    fits: dict[str, Callable] = {"faiss": faiss_kmeans, "own": own_kmeans}
    wall: dict[str, list[float]] = {name: [] for name in fits}
    cpu: dict[str, list[float]] = {name: [] for name in fits}
    found = {}
    for repetition in range(args.repetitions + 1):
        for name in fits if repetition % 2 else reversed(fits):
            starts = time.perf_counter(), time.process_time()
            centroids = fits[name](points, args.n_centroids, args.n_iter, seed)
            if repetition:  # the first one warms up
                wall[name].append(time.perf_counter() - starts[0])
                cpu[name].append(time.process_time() - starts[1])
            found[name] = objective(points, centroids)
    return {
        "wall": {name: statistics.median(values) for name, values in wall.items()},
        "cpu": {name: statistics.median(values) for name, values in cpu.items()},
        "objective": found,
    }


def scaling_cases() -> list[tuple[str, dict]]:
    """Return what is varied, and the number of blocks and of centroids, of each case."""
    cases = [("n_blocks", {**FIXED, "n_blocks": number}) for number in BLOCKS]
    return cases + [("n_centroids", {**FIXED, "n_centroids": number}) for number in CENTROIDS]


def measure_scaling(sizes: dict, seed: int, args: argparse.Namespace) -> dict:
    """Return the median time of a fit, wall clock and CPU."""
    points = random_blocks(sizes["n_blocks"], 8, 8, seed)
    wall, cpu = [], []
    for _ in range(args.repetitions + 1):
        starts = time.perf_counter(), time.process_time()
        own_kmeans(points, sizes["n_centroids"], args.n_iter, seed)
        wall.append(time.perf_counter() - starts[0])
        cpu.append(time.process_time() - starts[1])
    return {"wall": statistics.median(wall[1:]), "cpu": statistics.median(cpu[1:])}


def scaling_curves(lines: list[dict]) -> dict[str, dict[int, dict[int, float]]]:
    """Return what is varied -> threads -> its values with their seconds, medians over seeds."""
    found: dict[str, dict[int, dict[int, list[float]]]] = {}
    for line in lines:
        key = line["key"]
        if key.get("part") == "scaling":
            curve = found.setdefault(key["varied"], {}).setdefault(key["threads"], {})
            curve.setdefault(key[key["varied"]], []).append(line["wall"])
    return {
        varied: {
            threads: {number: statistics.median(curve[number]) for number in sorted(curve)}
            for threads, curve in curves.items()
        }
        for varied, curves in found.items()
    }


def exponent(curve: dict[int, float]) -> float:
    """Return e of the least-squares fit of seconds ~ number ** e, in logarithms."""
    x, y = ([math.log(value) for value in values] for values in (curve.keys(), curve.values()))
    return statistics.linear_regression(x, y).slope


def scaling_table(lines: list[dict]) -> str:
    """Return the times against blocks and centroids as Markdown tables; empty without lines."""
    text = []
    names = {"n_blocks": "blocks", "n_centroids": "centroids"}
    for varied, curves in scaling_curves(lines).items():
        header = [str(number) for number in next(iter(curves.values()))]
        text += [f"| threads, {names[varied]} | {' | '.join(header)} | exponent |",
                 "|---" * (len(header) + 2) + "|"]  # fmt: skip
        for threads, curve in curves.items():
            cells = [*(f"{seconds:.2f} s" for seconds in curve.values()), f"{exponent(curve):.2f}"]
            text.append(f"| {threads} | {' | '.join(cells)} |")
        text.append("")
    own = [line for line in lines if line["key"].get("part") == "scaling"]
    return "\n".join([*text, "\n\n".join(provenance(own))]) if own else ""


def table(lines: list[dict]) -> str:
    """Return the comparison as a Markdown table, with medians over seeds; empty without lines."""
    lines = [line for line in lines if "case" in line["key"]]
    if not lines:
        return ""
    text = [
        "| blocks | K | threads | faiss, CPU s | own, CPU s | CPU time | wall time | objective |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        key = line["key"]
        groups.setdefault((key["case"], key["n_centroids"], key["threads"]), []).append(line)
    for (case, n_centroids, threads), own in groups.items():
        medians = {
            name: statistics.median(line["cpu"][name] for line in own) for name in ("faiss", "own")
        }
        ratios = [
            statistics.median(line[what]["own"] / line[what]["faiss"] for line in own)
            for what in ("cpu", "wall", "objective")
        ]
        cells = [case, str(n_centroids), str(threads)]
        cells += [f"{medians['faiss']:.2f}", f"{medians['own']:.2f}"]
        cells += [f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", f"{ratios[2]:.4f}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", "\n\n".join(provenance(lines))])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--n_centroids", type=int, default=256)
    parser.add_argument("--n_iter", type=int, default=20, help="iterations of both")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    add_page_arguments(parser, RESULTS, PAGE)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    done = [line["key"] for line in read_lines(args.results)]
    for threads in args.threads:
        torch.set_num_threads(threads)
        for key, run in runs(args, threads):
            if key not in done:
                append_line(args.results, key, run())
    lines = read_lines(args.results)
    tables = {"kmeans": table(lines), "kmeans scaling": scaling_table(lines)}
    fill_page(args.page, **tables)
    print("\n\n".join(tables.values()))


def runs(args: argparse.Namespace, threads: int) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Yield the key of each run with some threads, and what measures it."""
    settings = {"n_iter": args.n_iter, "repetitions": args.repetitions, "threads": threads}
    if "faiss" in args.parts:
        if find_spec("faiss") is None:
            print("the comparison is not measured: run pip install faiss-cpu", file=sys.stderr)
        for case in args.cases if find_spec("faiss") else ():
            for seed in args.seeds:
                key = {"case": case, "seed": seed, "n_centroids": args.n_centroids, **settings}
                yield key, partial(measure, case, seed, args)
    if "scaling" in args.parts:
        for varied, sizes in scaling_cases():
            key = {"part": "scaling", "varied": varied, **sizes, "seed": args.seeds[0], **settings}
            yield key, partial(measure_scaling, sizes, args.seeds[0], args)


if __name__ == "__main__":
    main()
