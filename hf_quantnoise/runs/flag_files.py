"""Flags in a JSON file, whose values are checked as those of a command line."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable
from typing import Any

from transformers.hf_argparser import string_to_bool


def read_flags(file_name: str) -> dict[str, Any]:
    """Return the content of a JSON file of flags."""
    try:
        with open(file_name, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"invalid file of flags {file_name!r}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"invalid file of flags {file_name!r}: got a JSON {type(values).__name__}, "
            "expected an object with the names of flags as keys"
        )
    return values


def checked_values(
    values: dict[str, Any], parser: ArgumentParser, kinds: Iterable[type], file_name: str
) -> dict[str, Any]:
    """Return the values of known flags with the types that a command line gives them.

    Strings are read as on a command line, and null is the default.

    Args:
        values: of flags of the parser, by name.
        parser: has the flags.
        kinds: the dataclasses of the flags.
        file_name: of the values, for errors.

    Raises:
        ValueError: if a value has another type, or a flag without a default is missing.
    """
    fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    actions = parser._option_string_actions
    for name in fields:
        if actions[f"--{name}"].required and values.get(name) is None:
            raise ValueError(f"missing {name} in {file_name}: it has no default; add it")
    found = {}
    for name, value in values.items():
        if value is None and fields[name].default is not None:
            continue
        try:
            found[name] = None if value is None else _value_of(actions[f"--{name}"], value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"invalid {name} in {file_name}: got {json.dumps(value)}, expected {error}"
            ) from None
    return found


def _value_of(action: Any, value: Any) -> Any:
    """Return the value of a flag; the text of a ``ValueError`` is what was expected."""
    if action.nargs == "+" and action.type in (str, float):
        values = value if isinstance(value, list) else [value]
        return [_scalar_of(action, each) for each in values]
    return _scalar_of(action, value)


def _scalar_of(action: Any, value: Any) -> Any:
    if action.choices is not None:
        value = action.type(value) if isinstance(value, str) else value
        if value not in action.choices:
            raise ValueError(f"one of {', '.join(map(str, action.choices))}")
    elif action.type is string_to_bool and not isinstance(action.default, str):  # a word, too
        try:
            return string_to_bool(str(value))
        except ArgumentTypeError:
            raise ValueError("true or false") from None
    elif action.type in (int, float):
        expected = "an integer" if action.type is int else "a number"
        try:
            number = action.type(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(expected) from None
        if isinstance(value, bool) or (isinstance(value, float) and number != value == value):
            raise ValueError(expected)
        return number
    return value
