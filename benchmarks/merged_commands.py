"""Commands that select parts of a study, merged into as few commands as possible."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

# Options of the studies that take several values, each of which selects more runs.
SELECTIONS = ("--tasks", "--sizes", "--methods", "--rows", "--seeds")


def merged(commands: Iterable[str]) -> list[str]:
    """Return commands that make the same runs, in the order of the first ones.

    Two commands become one if they differ only in the values of one option of ``SELECTIONS``, or
    in the order of their options.
    """
    commands = list(dict.fromkeys(commands))
    found: list[dict[str, list[str]]] = []
    texts: list[str] = []
    for command in commands:
        options, position = _parsed(command), len(found)
        for index, other in enumerate(found):
            if _differ_in_one_selection(options, other):
                position = index
                options = {k: list(dict.fromkeys(v + options[k])) for k, v in other.items()}
                break
        found[position : position + 1], texts[position : position + 1] = [options], [command]
    joined = [
        text if _parsed(text) == options else _text(options)
        for text, options in zip(texts, found, strict=True)
    ]
    return joined if len(joined) == len(commands) else merged(joined)


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


def _differ_in_one_selection(one: dict, other: dict) -> bool:
    if one.keys() != other.keys():
        return False
    different = [name for name in one if _value(one, name) != _value(other, name)]
    return len(different) <= 1 and all(name in SELECTIONS for name in different)


def _value(options: dict, name: str) -> list | set:
    return set(options[name]) if name in SELECTIONS else options[name]


def _text(options: dict[str, list[str]]) -> str:
    ordered = sorted(options, key=lambda name: (name != "", name in SELECTIONS, name))
    words = (word for name in ordered for word in ([name] if name else []) + options[name])
    return shlex.join(words)
