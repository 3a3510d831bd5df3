"""Tables and plots of the ablations page, from the rows of ``--study language_model_ablations``.

The method of a row is "what is varied / series / value", as in ``language_model_ablations.py``.
"""

from __future__ import annotations

import statistics

from pareto import Panel, Point, svg
from results_file import provenance
from rows import Run, grouped
from tables import markdown, mean_and_spread

STUDY = "language_model_ablations"
# What is varied -> horizontal axis of its plot, and whether that is logarithmic.
PLOTS = {
    "rate": ("noise rate p", False),
    "centroids": ("centroids K", True),
    "blocks": ("block size", True),
}


def _parts(run: Run) -> list[str]:
    return run.method.split(" / ")


def by_axis(runs: list[Run]) -> dict[str, list[Run]]:
    """Return what is varied -> its runs."""
    return grouped(runs, lambda run: _parts(run)[0])


def _table(runs: list[Run]) -> str:
    rows = []
    for own in grouped(runs, "method").values():
        _, series, value = _parts(own[0])
        scores = [[run.scores[name] for run in own] for name in ("loss", "divergence")]
        rows.append(
            [
                series,
                value,
                mean_and_spread([run.value for run in own], "{:.2f}".format),
                " / ".join(dict.fromkeys(f"{run.start:.2f}" for run in own)),
                *(mean_and_spread(values, "{:.3f}".format) for values in scores),
                f"{statistics.mean(run.megabytes for run in own) * 1000:.1f}",
                f"{own[0].steps}",
                str(len(own)),
            ]
        )
    header = ["", "value", "perplexity", "float32", "loss", "divergence", "kB", "steps", "seeds"]
    return markdown(header, rows)


def sections(runs: list[Run]) -> dict[str, str]:
    """Return name of a block of the page -> its plot, table and commands."""
    blocks = {}
    for axis, own in by_axis(runs).items():
        blocks[axis] = _table(own)
        if axis in PLOTS:
            image = f"![Perplexity against {PLOTS[axis][0]}](results/{_name(axis)})"
            blocks[axis] = f"{image}\n\n{blocks[axis]}"
    if runs:
        blocks["commands"] = "\n\n".join(provenance([run.row for run in runs]))
    return blocks


def plots(runs: list[Run]) -> dict[str, str]:
    """Return file name -> plot of everything that is varied along a numeric axis."""
    return {_name(axis): _plot(axis, own) for axis, own in by_axis(runs).items() if axis in PLOTS}


def _name(axis: str) -> str:
    return f"{STUDY}-{axis}.svg"


def _plot(axis: str, runs: list[Run]) -> str:
    points = []
    for own in grouped(runs, "method").values():
        _, series, at = _parts(own[0])
        values = [run.value for run in own]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        points.append(Point(series, float(at), statistics.mean(values), spread))
    float32 = statistics.mean(run.start for run in runs)
    across, log = PLOTS[axis]
    return svg([Panel("perplexity", points, float32, across, log)], grouped(points, "method"))
