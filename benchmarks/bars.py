"""Horizontal bars as an SVG file, without a plotting library."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from html import escape

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "quality"))

from pareto import DASHED, Axis

WIDTH, LABELS, VALUES, LINE, COLOR = 660, 270, 60, 20, "#0072b2"


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        label: left of it.
        value: its length.
        low, high: ends of the line over its end, if any.
        goal: where a mark is drawn, if anywhere.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    goal: float | None = None


def bars_svg(
    groups: dict[str, list[Bar]], show: str = "{:.2f}", line: float | None = None, title: str = ""
) -> str:
    """Return bars from 0, in groups with a title each, on one scale.

    Args:
        groups: title -> bars; an empty title is not shown.
        show: format of the values.
        line: where a dashed line is drawn, if anywhere.
        title: of the scale, below it.
    """
    bars = [bar for own in groups.values() for bar in own]
    numbers = [each for bar in bars for each in (bar.value, bar.low, bar.high, bar.goal, line)]
    found = [number for number in numbers if number is not None]
    across = Axis([0.0, *found], LABELS, WIDTH - VALUES, log=False)
    parts, y = [], 10.0
    for name, own in groups.items():
        if name:
            parts.append(f'<text x="14" y="{y + 14:.1f}" font-weight="bold">{escape(name)}</text>')
            y += LINE
        for bar in own:
            parts += _bar(bar, y, across, show)
            y += LINE
    if line is not None:
        parts.append(f'<path d="M{across(line):.1f},10V{y:.1f}" {DASHED}/>')
    for tick in across.ticks(44):
        at = f"{across(tick):.1f}"
        parts.append(f'<path d="M{at},{y:.1f}v5" stroke="#444444"/>')
        parts.append(f'<text x="{at}" y="{y + 18:.1f}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<path d="M{LABELS},{y:.1f}H{WIDTH - VALUES}" stroke="#444444"/>')
    middle = (LABELS + WIDTH - VALUES) / 2
    text = f'<text x="{middle}" y="{y + 36:.1f}" text-anchor="middle">{escape(title)}</text>'
    height = round(y + 46)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
    head += f'width="{WIDTH}" font-family="sans-serif" font-size="12" fill="#222222">'
    card = f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, card, *parts, text, "</svg>"]) + "\n"


def _bar(bar: Bar, y: float, across: Axis, show: str) -> list[str]:
    start, end = sorted((across(0.0), across(bar.value)))
    value = show.format(bar.value)
    parts = [
        f'<text x="{LABELS - 8}" y="{y + 14:.1f}" text-anchor="end">{escape(bar.label)}</text>',
        f'<rect x="{start:.1f}" y="{y + 4:.1f}" width="{end - start:.1f}" height="12" '
        f'fill="{COLOR}" fill-opacity="0.7"/>',
        f'<text x="{WIDTH - 10}" y="{y + 14:.1f}" text-anchor="end">{value}</text>',
    ]
    if bar.low is not None and bar.high is not None:
        low, high = across(bar.low), across(bar.high)
        parts.append(f'<path d="M{low:.1f},{y + 10:.1f}H{high:.1f}" stroke="#222222"/>')
    if bar.goal is not None:
        at = across(bar.goal)
        parts.append(f'<path d="M{at:.1f},{y + 1:.1f}v18" stroke="#d55e00" stroke-width="2"/>')
    return parts
