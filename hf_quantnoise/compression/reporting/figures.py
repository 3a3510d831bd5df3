"""Parts of plots that show layers, groups or stages as rows.

Colors of text and background are those of matplotlib's style, so that dark styles work as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...size import SizeRow, total_of
from ...text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8  # inches; with 120 dots per inch, text is readable at 800 pixels
MAX_ROWS = 48  # with more, layers that differ only in their index share a row
_LONGEST = 44  # characters of a label
GREY = "0.5"  # visible on light and dark backgrounds


def new_figure(n_rows: int, panels: int = 1) -> Figure:
    """Return a figure for plots with ``n_rows`` rows in each of ``panels`` rows of plots.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, panels * (0.9 + 0.22 * n_rows) + 0.5), layout="constrained")


def save(figure: Figure, path: str) -> None:
    """Write a PNG file."""
    figure.savefig(path, dpi=120)


def label(name: str, longest: int = _LONGEST) -> str:
    """Return a name as it is shown: in one line, without formulas, shortened in the middle."""
    name = printable(name)
    if len(name) > longest:
        name = f"{name[: longest // 4]}…{name[-(longest * 3 // 4 - 1) :]}"
    return name.replace("$", r"\$")  # which begins a formula


def rows_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of each row: one name, or those of all repetitions of a layer."""
    rows: dict[str, list[str]] = {}
    for name in names:
        repeated = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        rows.setdefault(repeated if len(names) > MAX_ROWS else name, []).append(name)
    return rows


def name_rows(axes: Axes, names: Iterable[str]) -> None:
    """Give the rows of a plot their names, from top to bottom."""
    labels = [label(name) for name in names]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def bytes_axis(axes: Axes, values: Iterable[float]) -> None:
    """Make the x axis, which shows bytes, logarithmic, with a few ticks."""
    found = [value for value in values if value > 0] or [1.0]
    low, high = min(found) / 1.5, max(found) * 1.5
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = _ticks(low, high)
    axes.set_xticks(ticks, list(map(_size, ticks)))
    axes.set_xticks([], minor=True)


def _ticks(low: float, high: float) -> list[float]:
    """Return two to four round values between two positive ones, if there are any."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 1:
            break
    return ticks[:: math.ceil(len(ticks) / 4)] if ticks else []


def _size(n_bytes: float) -> str:
    """Return a size in the largest unit that it is one of."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor * 0.999:
            return f"{n_bytes / factor:.4g} {unit}"
    return f"{n_bytes:.4g} B"


def show_sizes(axes: Axes, rows: Sequence[Sequence[SizeRow]], summed: bool = False) -> None:
    """Show the size of tensors in the file and in float32, and write how they are stored.

    Args:
        axes: whose rows have names.
        rows: tensors of each row.
        summed: show one size for each row; False: one for each layer.
    """
    stored, dense = (_points(rows, size, summed) for size in ("disk_bytes", "dense_bytes"))
    for number, tensors in enumerate(rows):
        total = total_of(tensors)
        if total.disk_bytes and total.dense_bytes:
            of_row = [x for points in (stored, dense) for x, y in points if y == number]
            axes.hlines(number, min(of_row), max(of_row), color=GREY, lw=0.8, zorder=1)
        position: Any = (1.02, number)
        axes.annotate(
            _storage(tensors), position, xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    for points, style in ((dense, {"facecolors": "none", "edgecolors": GREY}), (stored, {})):
        name = "float32" if points is dense else "in the file"
        axes.scatter(*(zip(*points, strict=True) if points else ((), ())), 24, zorder=2, label=name,
                     **style)  # fmt: skip
    bytes_axis(axes, (x for x, _ in stored + dense))


def _points(rows: Sequence[Sequence[SizeRow]], size: str, summed: bool) -> list[tuple[float, int]]:
    """Return (bytes, row) of all layers; tensors that are not layers are one point of their row."""
    points = []
    for number, tensors in enumerate(rows):
        sizes = [getattr(tensor, size) or 0 for tensor in tensors]
        if summed or any(tensor.group == "other" for tensor in tensors):
            sizes = [sum(sizes)]
        points += [(each, number) for each in sizes if each]
    return points


def _storage(tensors: Sequence[SizeRow]) -> str:
    """Return how the tensors of a row are stored, and how much smaller that is."""
    kinds = list(dict.fromkeys(re.sub("^tied to .*", "tied", tensor.stored) for tensor in tensors))
    text = ", ".join(map(printable, kinds[:2])) + (", ..." if len(kinds) > 2 else "")
    total = total_of(tensors)
    smaller = ""
    if total.dense_bytes and total.disk_bytes and total.dense_bytes != total.disk_bytes:
        smaller = f", {total.dense_bytes / total.disk_bytes:.1f}x smaller"
    count = f"{len(tensors)} x " if len(tensors) > 1 else ""
    return f"{count}{text}{smaller}".replace("$", r"\$")
