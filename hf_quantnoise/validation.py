"""Checks of single fields, shared by all configs: each error names the field, the value given and
what would do."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name: str, value: Any, low: int, high: int) -> None:
    if not is_int(value) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be an integer from {low} to {high}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def check_word_or_steps(name: str, value: Any, word: str) -> None:
    if value == word or (is_int(value) and 1 <= value <= 2**31):
        return
    raise ValueError(f"{name}={value!r} must be {word!r} or a number of steps, at least 1")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def check_rate(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r} must be a rate from 0 to 1 (0: no noise, 1: QAT)")


def check_per_layer(name: str, value: Any, low: int, high: int) -> None:
    """An integer for all layers, or a dict from structure group or regex to one."""
    if not isinstance(value, dict):
        return check_int(name, value, low, high)
    if not value:
        raise ValueError(f"{name}={value!r} is empty; give an int or {{group or regex: int}}")
    for key, entry in value.items():
        if not is_int(entry) or not low <= entry <= high:
            raise ValueError(
                f"{name}={value!r}: {entry!r} (for {key!r}) must be an integer from {low} to {high}"
            )
        check_regex(name, key)


def check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"{name}: {pattern!r} must be a string (a structure group or a regex)")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None


def check_patterns(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str):
        return check_regex(name, value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ValueError(
            f"{name}={value!r} must be a regex string or a list of exact names and suffixes"
        )


def reject_unknown(cls: type, given: dict[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    for key in given:
        if key not in known:
            raise ValueError(f"{cls.__name__} has no field {key!r}; fields: {', '.join(known)}")


def check_share_layers(name: str, value: Any) -> None:
    """A number of layers per chunk, or the names of the layers of each chunk."""
    if is_int(value) and value >= 1:
        return
    chunks = value if isinstance(value, (list, tuple)) else []
    named = [layer for chunk in chunks if isinstance(chunk, (list, tuple)) for layer in chunk]
    if not named or not all(isinstance(layer, str) for layer in named):
        raise ValueError(
            f"{name}={value!r} must be the number of layers per chunk (1: no sharing), or a list "
            "of chunks, each a list of layer names"
        )
    if twice := sorted({layer for layer in named if named.count(layer) > 1}):
        raise ValueError(f"{name}={value!r} names {twice[0]!r} twice")
