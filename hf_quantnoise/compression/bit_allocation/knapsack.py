"""Multiple-choice knapsack: one option per weight, at the least cost within a byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """One way to store a weight: its bytes, and its cost in accuracy (in any additive unit)."""

    bytes: int
    cost: float


def _lower_hull(options: Sequence[Option]) -> list[int]:
    """Return the lower convex hull of cost over bytes, as indices by increasing bytes."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: options[index]):
        size, cost = options[index]
        if hull and cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1:
            first, middle = options[hull[-2]], options[hull[-1]]
            # Keep the middle option if it is below the line from the first to the new one.
            if (first.cost - middle.cost) * (size - first.bytes) > (first.cost - cost) * (
                middle.bytes - first.bytes
            ):
                break
            hull.pop()
        hull.append(index)
    return hull


def allocate_bytes(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose one option for each weight.

    Steps along the convex hull of each weight are made in the order of cost saved per byte. If they
    use up the budget exactly, the result is optimal (one Lagrange multiplier for all weights).
    Otherwise the remaining bytes are spent on single weights. Returns the index of the option of
    each weight: the smallest options if the budget is below their sum.
    """
    hulls = [_lower_hull(choices) for choices in options]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(choices[i].bytes for choices, i in zip(options, chosen, strict=True))
    steps = []
    for weight, (choices, hull) in enumerate(zip(options, hulls, strict=True)):
        for before, after in pairwise(hull):
            price = choices[after].bytes - choices[before].bytes
            gain = choices[before].cost - choices[after].cost
            steps.append((-gain / max(price, 1), weight, price, after))
    stopped: set[int] = set()
    for _, weight, price, after in sorted(steps):
        if weight in stopped or price > left:
            stopped.add(weight)  # its later steps start where this one ends
            continue
        chosen[weight] = after
        left -= price
    _spend(options, chosen, left)
    return chosen


def _spend(options: Sequence[Sequence[Option]], chosen: list[int], left: int) -> None:
    """Repeat the single change that saves the most cost within the remaining bytes, in place."""
    while True:
        best = (0.0, 0, 0, 0)
        for weight, choices in enumerate(options):
            current = choices[chosen[weight]]
            for index, option in enumerate(choices):
                price = option.bytes - current.bytes
                if price <= left and current.cost - option.cost > best[0]:
                    best = (current.cost - option.cost, weight, index, price)
        if not best[0]:
            return
        _, weight, chosen[weight], price = best
        left -= price
