"""One choice for each weight, of least cost within a number of bytes (a knapsack of choices)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One choice: bytes, and what it costs in accuracy (any unit that adds up)."""

    bytes: int
    cost: float


def smallest(options: Sequence[Option]) -> int:
    """Place of the option with the fewest bytes (of those, the cheapest)."""
    return min(range(len(options)), key=lambda place: options[place])


def _hull(options: Sequence[Option]) -> list[int]:
    """Places of the lower convex hull of cost over bytes, from the smallest to the cheapest."""
    hull: list[int] = []
    for place in sorted(range(len(options)), key=lambda place: options[place]):
        size, cost = options[place]
        if hull and cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1:
            first, middle = options[hull[-2]], options[hull[-1]]
            # The middle one lies above the line from the first to this one.
            if (first.cost - middle.cost) * (size - first.bytes) > (first.cost - cost) * (
                middle.bytes - first.bytes
            ):
                break
            hull.pop()
        hull.append(place)
    return hull


def allocate_bytes(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """One option of each weight.

    Steps along each weight's convex hull are taken in the order of cost saved per byte, which for a
    budget that is used up just so is the least cost there is (one Lagrange multiplier for all);
    then single weights move to any better option that what is left over pays for.

    Args:
        options: of each weight.
        budget: bytes in all.

    Returns:
        Place of the option of each weight; the smallest of all where the budget is below them.
    """
    hulls = [_hull(own) for own in options]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(own[place].bytes for own, place in zip(options, chosen, strict=True))
    steps = []
    for number, (own, hull) in enumerate(zip(options, hulls, strict=True)):
        for before, after in zip(hull, hull[1:], strict=False):
            price = own[after].bytes - own[before].bytes
            gain = own[before].cost - own[after].cost
            steps.append((-gain / max(price, 1), number, price, after))
    stopped: set[int] = set()
    for _, number, price, after in sorted(steps):
        if number in stopped or price > left:
            stopped.add(number)  # later steps of this weight begin where this one ends
            continue
        chosen[number] = after
        left -= price
    _spend(options, chosen, left)
    return chosen


def _spend(options: Sequence[Sequence[Option]], chosen: list[int], left: int) -> None:
    """Moves weights to the option that saves most within what is left, until none does."""
    while True:
        best = (0.0, 0, 0, 0)
        for number, own in enumerate(options):
            now = own[chosen[number]]
            for place, option in enumerate(own):
                price = option.bytes - now.bytes
                if price <= left and now.cost - option.cost > best[0]:
                    best = (now.cost - option.cost, number, place, price)
        if not best[0]:
            return
        _, number, chosen[number], price = best
        left -= price
