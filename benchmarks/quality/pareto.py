"""Plots of a metric against megabytes or a setting, as SVG files, without a plotting library."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from rows import METRICS, Run, by_seed, grouped
from tables import average, column_title, float32_starts, tasks_of

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#000000", "#7f3c8d")
# Outlines around (0, 0), one per method.
MARKS = (
    "M-5,0 a5,5 0 1,0 10,0 a5,5 0 1,0 -10,0z",
    "M-4.5,-4.5h9v9h-9z",
    "M0,-5.5L5.5,4.5H-5.5z",
    "M0,-6.5L6.5,0L0,6.5L-6.5,0z",
    "M0,5.5L5.5,-4.5H-5.5z",
    "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
)
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 330, 250, 52, 34, 14, 42
COLUMNS, LINE = 2, 20


@dataclass(frozen=True)
class Point:
    """Mean and spread over seeds of a method at a size, or at a value of a setting."""

    method: str
    at: float
    mean: float
    spread: float


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        title: above it.
        points: in any order.
        float32: height of the dashed line, or None.
        across: name of the horizontal axis.
        log: whether that axis is logarithmic.
    """

    title: str
    points: list[Point]
    float32: float | None
    across: str = "MB"
    log: bool = True


def panels(runs: list[Run]) -> list[Panel]:
    """Return one panel per task, and one of the average share of float32 for several tasks."""
    arms = list(grouped(runs, "arm").values())
    shown = []
    for task in tasks_of(runs):
        own = [[run for run in arm if run.task == task] for arm in arms]
        own = [arm for arm in own if arm]
        factor = METRICS[own[0][0].metric].factor
        points = [_point(arm, [factor * run.value for run in arm]) for arm in own]
        start = factor * statistics.mean(float32_starts(runs, task).values())
        shown.append(Panel(column_title(task, runs), points, start))
    if len(shown) > 1:
        full = [arm for arm in arms if by_seed(arm) and tasks_of(arm) == tasks_of(runs)]
        points = [
            _point(arm, [100 * v for v in average(arm, lambda run: run.kept)]) for arm in full
        ]
        if points:
            shown.insert(0, Panel("average, % of float32", points, 100.0))
    return shown


def _point(arm: list[Run], values: list[float]) -> Point:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    size = statistics.mean(run.megabytes for run in arm)
    return Point(arm[0].method, size, statistics.mean(values), spread)


class Axis:
    """Maps values to pixels, linearly or on a logarithmic scale, and has ticks that fit."""

    def __init__(self, values: list[float], start: float, end: float, log: bool) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = (self._scale(f(values)) for f in (min, max))
        margin = 0.07 * (high - low) or (0.1 if log else 1.0)
        self.low, self.high = low - margin, high + margin

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, room: float) -> list[float]:
        """Return at least three round values, if there is room: ``room`` pixels each."""
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        top, kept = math.ceil(math.log10(high - low)), []
        for step in (
            factor * 10.0**power for power in (top, top - 1, top - 2) for factor in (5, 2, 1)
        ):
            first, last = max(math.ceil(low / step), 1 if self.log else -sys.maxsize), high // step
            kept = []
            for tick in (step * index for index in range(first, int(last) + 1)):
                if not kept or abs(self(tick) - self(kept[-1])) >= room:
                    kept.append(tick)
            if len(kept) >= 4:
                break
        return kept


def _label(value: float) -> str:
    return f"{value:.6g}"


def _panel(panel: Panel, x: float, y: float, styles: dict[str, int]) -> list[str]:
    right, bottom = x + WIDTH - RIGHT, y + HEIGHT - BOTTOM
    heights = [h for p in panel.points for h in (p.mean - p.spread, p.mean + p.spread)]
    across = Axis([p.at for p in panel.points], x + LEFT, right, log=panel.log)
    line = [] if panel.float32 is None else [panel.float32]
    up = Axis([*heights, *line], bottom, y + TOP, log=False)
    title, name, middle = escape(panel.title), escape(panel.across), (x + LEFT + right) / 2
    parts = [
        f'<text x="{x + LEFT:.1f}" y="{y + 20:.1f}" font-weight="bold">{title}</text>',
        f'<text x="{middle:.1f}" y="{bottom + 36:.1f}" text-anchor="middle">{name}</text>',
    ]
    for tick in up.ticks(28):
        h = up(tick)
        parts.append(f'<path d="M{x + LEFT:.1f},{h:.1f}H{right:.1f}" stroke="#dddddd"/>')
        parts.append(
            f'<text x="{x + LEFT - 6:.1f}" y="{h + 4:.1f}" text-anchor="end">{_label(tick)}</text>'
        )
    for tick in across.ticks(44):
        at = across(tick)
        parts.append(f'<path d="M{at:.1f},{bottom:.1f}v5" stroke="#444444"/>')
        label = (
            f'<text x="{at:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{_label(tick)}</text>'
        )
        parts.append(label)
    parts += [f'<path d="M{x + LEFT:.1f},{up(at):.1f}H{right:.1f}" {DASHED}/>' for at in line]
    frame = f"M{x + LEFT:.1f},{y + TOP:.1f}V{bottom:.1f}H{right:.1f}"
    parts.append(f'<path d="{frame}" fill="none" stroke="#444444"/>')

    def place(p: Point) -> float:
        """Return where a point is: beside those of its size, so that all spreads can be seen."""
        others = (q.at for q in panel.points if q.method != p.method)
        is_alone = all(abs(across(p.at) - across(at)) > 5 for at in others)
        return across(p.at) + (0 if is_alone else 4 * (styles[p.method] - (len(styles) - 1) / 2))

    for method, points in grouped(panel.points, "method").items():
        color = COLORS[styles[method] % len(COLORS)]
        points = sorted(points, key=lambda p: p.at)
        path = "L".join(f"{place(p):.1f},{up(p.mean):.1f}" for p in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{color}" opacity="0.5"/>')
        for p in points:
            low, high = up(p.mean - p.spread), up(p.mean + p.spread)
            at = place(p)
            if p.spread:
                parts.append(f'<path d="M{at:.1f},{low:.1f}V{high:.1f}" stroke="{color}"/>')
            parts.append(_mark(at, up(p.mean), styles[method]))
    return parts


DASHED = 'stroke="#444444" stroke-width="1.5" stroke-dasharray="6,4"'


def _mark(x: float, y: float, style: int) -> str:
    color, mark = COLORS[style % len(COLORS)], MARKS[style % len(MARKS)]
    place = f'transform="translate({x:.1f},{y:.1f})"'
    return f'<path d="{mark}" {place} fill="{color}" stroke="#ffffff" fill-opacity="0.9"/>'


def pareto_svg(runs: list[Run]) -> str:
    """Return the plot of the runs of a study, with one mark per method and a legend below."""
    return svg(panels(runs), grouped(runs, "method"))


def svg(shown: list[Panel], methods: Iterable[str], dashed: str = "float32") -> str:
    """Return diagrams with a common legend, which has the methods in their order.

    ``dashed`` is the name of the dashed line, if a panel has one.
    """
    styles = {method: index for index, method in enumerate(methods)}
    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    parts: list[str] = []
    for index, panel in enumerate(shown):
        row, column = divmod(index, columns)
        parts += _panel(panel, column * WIDTH, row * HEIGHT, styles)
    y = lines * HEIGHT + 10
    if any(panel.float32 is not None for panel in shown):
        parts.append(f'<path d="M14,{y}h28" {DASHED}/><text x="50" y="{y + 4}">{dashed}</text>')
    else:
        y -= LINE
    for method, style in styles.items():
        y += LINE
        parts.append(_mark(28, y, style) + f'<text x="50" y="{y + 4}">{escape(method)}</text>')
    width, height = columns * WIDTH, y + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    head += f'width="{width}" font-family="sans-serif" font-size="12" fill="#222222">'
    card = f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, card, *parts, "</svg>"]) + "\n"
