"""Commands that select parts of a study, merged into as few commands as possible."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from functools import cache
from itertools import combinations

# Options of the studies that take several values, each of which selects more runs.
SELECTIONS = ("--tasks", "--sizes", "--methods", "--rows", "--seeds")


def merged(commands: Iterable[str]) -> list[str]:
    """Return commands that make the same runs, in the order of the first ones.

    Two commands become one if they differ only in the values of one option of ``SELECTIONS``, or
    in the order of their options.
    """
    commands = list(dict.fromkeys(commands))
    for one, other in combinations(commands, 2):
        if (both := _joined(_parsed(one), _parsed(other))) is not None:
            return merged(both if each == one else each for each in commands if each != other)
    return commands


@cache
def _parsed(command: str) -> dict[str, list[str]]:
    """Return option -> its values; those before the first option belong to the option ``""``."""
    options: dict[str, list[str]] = {"": []}
    name = ""
    for word in shlex.split(command):
        if word.startswith("--"):
            name = word
            options.setdefault(name, [])
        else:
            options[name].append(word)
    return options


def _joined(one: dict[str, list[str]], other: dict[str, list[str]]) -> str | None:
    """Return a command with the options of two, or None if they differ in more than one."""
    if one.keys() != other.keys():
        return None
    different = [name for name in one if _value(one, name) != _value(other, name)]
    if len(different) > 1 or not set(different) <= set(SELECTIONS):
        return None
    words = []
    for name in sorted(one, key=lambda name: (name != "", name in SELECTIONS, name)):
        words += [name] if name else []
        words += dict.fromkeys(one[name] + other[name]) if name in SELECTIONS else one[name]
    return shlex.join(words)


def _value(options: dict[str, list[str]], name: str) -> list | set:
    return set(options[name]) if name in SELECTIONS else options[name]
