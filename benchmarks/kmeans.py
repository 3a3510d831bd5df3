"""k-means beside that of faiss: CPU time and objective on the blocks of random weights.

Both run from scratch on all points, in turn and with the same number of threads. Values of weights
follow Student's t distribution with 5 degrees of freedom, as heavy-tailed as those of real models.

    pip install faiss-cpu
    python benchmarks/kmeans.py

Each case and seed appends a line to ``--results``; those that are there are not measured again. The
table is written into docs/reference/performance.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pages import fill_page
from results_file import append_line, provenance, read_lines
from torch import Tensor

from hf_quantnoise.quantizers.kmeans import assign, kmeans

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kmeans.jsonl"
PAGE = ROOT / "docs" / "reference" / "performance.md"
# Name -> (rows, columns, block size): layers of MiniLM and RoBERTa-base, and MiniLM's words.
CASES = {
    "384 x 1536, blocks of 4": (384, 1536, 4),
    "768 x 3072, blocks of 4": (768, 3072, 4),
    "30522 x 384, blocks of 8": (30522, 384, 8),
}


def blocks_of(case: str, seed: int) -> Tensor:
    """Return the blocks of a random weight, shape (N, block size)."""
    rows, columns, block_size = CASES[case]
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


def table(lines: list[dict]) -> str:
    """Return the results as a Markdown table, with medians over seeds."""
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
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--n_centroids", type=int, default=256)
    parser.add_argument("--n_iter", type=int, default=20, help="iterations of both")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--results", default=str(RESULTS), help="JSON lines, appended to")
    parser.add_argument("--page", default=str(PAGE), help="page with the table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point; ``argv`` defaults to the command line."""
    args = parse(argv)
    done = [line["key"] for line in read_lines(args.results)]
    for threads in args.threads:
        torch.set_num_threads(threads)
        for case in args.cases:
            for seed in args.seeds:
                settings = {name: getattr(args, name) for name in ("n_centroids", "n_iter")}
                key = {"case": case, "seed": seed, "threads": threads, **settings}
                key["repetitions"] = args.repetitions
                if key not in done:
                    append_line(args.results, key, measure(case, seed, args))
    lines = read_lines(args.results)
    fill_page(args.page, kmeans=table(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
