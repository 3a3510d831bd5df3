"""Write the tables and plots of docs/reference/performance.md from the rows in benchmarks/results.

    python benchmarks/performance.py
    python benchmarks/performance.py --check

The scripts that measure write their tables there as well; the plots, in docs/reference/results, are
written by this one alone. ``--check`` writes nothing and exits with 1 if a file is out of date.
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import compression_overhead
import kmeans
import noise_overhead
import one_shot
import startup
from bars import Bar, bars_svg
from pages import fill
from pareto import Panel, Point, svg
from results_file import read_lines

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOTS = Path("docs/reference/performance.md"), Path("docs/reference/results")
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Topic:
    """A block of the page, and the block ``<name> plot`` with a plot.

    Attributes:
        file: of the rows, in the folder of results.
        table: of the rows, in Markdown; None if another page has it.
        plot: of the rows, as SVG; both return nothing without rows for them.
        shows: alternative text of the plot.
    """

    file: str
    table: Callable[[list[dict]], str] | None
    plot: Callable[[list[dict]], str]
    shows: str


def noise_plot(lines: list[dict]) -> str:
    """Return the overheads with their quartiles and goals, by setting."""
    groups: dict[str, list[Bar]] = {}
    for line in lines:
        key = line["key"]
        low, middle, high = (100 * (ratio - 1) for ratio in line["quartiles"])
        goal = noise_overhead.NOISES[key["noise"]].goal
        groups.setdefault(key["setting"], []).append(Bar(key["noise"], middle, low, high, goal))
    return bars_svg(groups, "{:+.1f}", title="overhead of a step, %; line: quartiles, mark: goal")


def kmeans_plot(lines: list[dict]) -> str:
    """Return the wall times relative to faiss."""
    groups: dict[str, list[Bar]] = {}
    found: dict[tuple, list[float]] = {}
    for line in lines:
        if (key := line["key"]).get("case"):
            ratio = line["wall"]["own"] / line["wall"]["faiss"]
            found.setdefault((_threads(key["threads"]), key["case"]), []).append(ratio)
    for (threads, case), ratios in found.items():
        groups.setdefault(threads, []).append(Bar(case, statistics.median(ratios)))
    return bars_svg(groups, line=1.0, title="time, relative to faiss") if groups else ""


def scaling_plot(lines: list[dict]) -> str:
    """Return the seconds of a fit against the number of blocks, and of centroids."""
    panels, methods = [], []
    names = {"n_blocks": "blocks, millions", "n_centroids": "centroids"}
    for varied, curves in kmeans.scaling_curves(lines).items():
        unit, points = 1e6 if varied == "n_blocks" else 1, []
        for threads, curve in curves.items():
            points += [Point(_threads(threads), n / unit, s, 0.0) for n, s in curve.items()]
            methods.append(_threads(threads))
        exponents = ", ".join(f"{kmeans.exponent(curve):.2f}" for curve in curves.values())
        title = f"seconds, exponent {exponents}"
        panels.append(Panel(title, points, None, names[varied], log=False))
    return svg(panels, dict.fromkeys(methods)) if panels else ""


def one_shot_plot(lines: list[dict]) -> str:
    """Return seconds and memory against parameters."""
    panels = []
    goal = one_shot.GOAL_BYTES / 1e6
    for title, value, dashed in (
        ("seconds", lambda line: line["seconds"], None),
        ("peak beyond dense, MB", lambda line: (line["peak"] - line["dense"]) / 1e6, goal),
    ):
        points = [
            Point(_threads(line["key"]["threads"]), line["parameters"] / 1e6, value(line), 0.0)
            for line in lines
        ]
        panels.append(Panel(title, points, dashed, "parameters, millions", log=False))
    methods = dict.fromkeys(_threads(line["key"]["threads"]) for line in lines)
    return svg(panels, methods, dashed="goal: 1 GiB")


def compression_plot(lines: list[dict]) -> str:
    """Return what each part adds to plain finetuning."""
    medians = compression_overhead.medians_of(lines)
    plain = sum(medians["plain"].values())
    bars = [
        Bar(part, 100 * (seconds - medians["plain"][part]) / plain)
        for part, seconds in medians["compression"].items()
    ]
    return bars_svg({"": bars}, "{:+.1f}", title="% of plain finetuning")


def startup_table(lines: list[dict]) -> str:
    """Return the table of the last run."""
    return startup.table(lines[-1])


def startup_plot(lines: list[dict]) -> str:
    """Return the CPU seconds of the last run, best and range."""
    bars = [
        Bar(case, statistics.median(own), min(own), max(own))
        for case, own in lines[-1]["seconds"].items()
    ]
    return bars_svg({"": bars}, title="CPU seconds, median; line: smallest and largest")


def inference_plot(lines: list[dict]) -> str:
    """Return the speed of each form of MiniLM on one thread, relative to dense float32."""
    groups = {}
    for line in lines:
        key = line["key"]
        if key["case"].startswith("MiniLM") and key["threads"] == 1:
            groups[key["case"]] = [
                Bar(name, form["speed"], *form["quartiles"])
                for name, form in line["variants"].items()
            ]
    return bars_svg(groups, line=1.0, title="speed, relative to dense float32") if groups else ""


TOPICS = {
    "inference": Topic("speed.jsonl", None, inference_plot, "Speed of forms of MiniLM"),
    "noise": Topic(
        "noise_overhead.jsonl", noise_overhead.table, noise_plot, "Overhead of each noise"
    ),
    "kmeans": Topic("kmeans.jsonl", kmeans.table, kmeans_plot, "Time relative to faiss"),
    "kmeans scaling": Topic(
        "kmeans.jsonl", kmeans.scaling_table, scaling_plot, "Time against blocks and centroids"
    ),
    "one shot": Topic(
        "one_shot.jsonl", one_shot.table, one_shot_plot, "Time and memory against parameters"
    ),
    "compression": Topic(
        "compression_overhead.jsonl", compression_overhead.table, compression_plot,
        "Parts of a compression run",
    ),
    "startup": Topic("startup.jsonl", startup_table, startup_plot, "CPU seconds of processes"),
}  # fmt: skip


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def plot_path(name: str) -> Path:
    """Return the file of a topic's plot."""
    return PLOTS / f"performance-{name.replace(' ', '_')}.svg"


def files(root: Path) -> dict[Path, str]:
    """Return the content of every generated file."""
    blocks, content = {}, {}
    for name, topic in TOPICS.items():
        lines = read_lines(str(root / RESULTS / topic.file))
        made = {
            each: function(lines) if lines else ""
            for each, function in (("table", topic.table), ("plot", topic.plot))
            if function is not None
        }
        if "table" in made:
            blocks[name] = made["table"] or "Not measured yet."
        if made["plot"]:
            content[root / plot_path(name)] = made["plot"]
            blocks[f"{name} plot"] = f"![{topic.shows}](results/{plot_path(name).name})"
    text = (root / PAGE).read_text("utf-8")
    return {root / PAGE: fill(text, blocks), **content}


def main(argv: list[str] | None = None) -> None:
    """Write or check all files; ``argv`` defaults to the command line."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    for path, text in files(ROOT).items():
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        if args.check:
            sys.exit(f"{path.relative_to(ROOT)} is out of date; run benchmarks/performance.py")
        path.write_text(text, "utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
