"""Checks of single option values.

A check is a function of name and value that raises a ``ValueError`` with the name, the value and
what was expected. Functions with other parameters return such a check.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from typing import Any

from ..files.reading import MAX_ENTRIES, MAX_NAME_LENGTH
from ..patterns import compile_pattern
from ..text import shown

Check = Callable[[str, Any], None]


_compiles: ContextVar[bool] = ContextVar("compiles", default=True)


@contextmanager
def regexes_not_compiled() -> Iterator[None]:
    """Accept any regex in this context, for the values of a saved config.

    A packed model uses none of its regexes, and one of a stranger may take very long to compile.
    """
    token = _compiles.set(False)
    try:
        yield
    finally:
        _compiles.reset(token)


def invalid(name: str, value: Any, expected: str) -> ValueError:
    """Return the error of an invalid value, to be raised."""
    return ValueError(f"invalid {name}={shown(value)}: expected {expected}")


def is_int(value: Any) -> bool:
    """Whether a value is an integer; ``True`` and ``False`` are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def integer(low: int, high: int = 2**31) -> Check:
    """An integer from ``low`` to ``high``."""

    def check(name: str, value: Any) -> None:
        if not is_int(value) or not low <= value <= high:
            raise invalid(name, value, f"an integer from {low} to {high}")

    return check


def boolean(name: str, value: Any) -> None:
    """``True`` or ``False``."""
    if not isinstance(value, bool):
        raise invalid(name, value, "True or False")


def number(expected: str, is_valid: Callable[[float], bool]) -> Check:
    """A real number for which a condition holds."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise invalid(name, value, expected)
        try:
            valid = is_valid(float(value))
        except OverflowError:  # an integer that float64 cannot hold
            valid = False
        if not valid:
            raise invalid(name, value, expected)

    return check


positive = number("a number above 0", lambda value: 0 < value < float("inf"))
non_negative = number("a number of at least 0", lambda value: 0 <= value < float("inf"))
fraction = number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def rows_or_share(name: str, value: Any) -> None:
    """A number of rows, or the share of lookups that they serve."""
    is_share = isinstance(value, float) and 0 < value <= 1
    if not is_share and not (is_int(value) and 1 <= value <= 2**31):
        raise invalid(name, value, "a number of rows (8000), or a share of the lookups (0.96)")


def one_of(choices: Iterable) -> Check:
    """One of some values; a registry may get more of them later."""

    def check(name: str, value: Any) -> None:
        known = list(choices)
        if not any(type(value) is type(choice) and value == choice for choice in known):
            raise invalid(name, value, f"one of {', '.join(map(repr, known))}")

    return check


def list_of(of_value: Check, low: int, high: int) -> Check:
    """A list of ``low`` to ``high`` checked values."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            raise invalid(name, value, f"a list of {low} to {high} values")
        for number, entry in enumerate(value):
            of_value(f"{name}[{number}]", entry)

    return check


def word_or_steps(word: str) -> Check:
    """A fixed word, or a number of optimizer steps."""

    def check(name: str, value: Any) -> None:
        if value != word and not (is_int(value) and 1 <= value <= 2**31):
            raise invalid(name, value, f"{word!r} or a number of steps (at least 1)")

    return check


def sizes(low: int, high: int) -> Check:
    """An integer for all layers, or a dict from structure group or regex to an integer."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            return integer(low, high)(name, value)
        if not value:
            raise invalid(name, value, "an integer or {group or regex: integer}, not empty")
        for key, entry in value.items():
            integer(low, high)(f"{name}[{key!r}]", entry)
            regex(name, key)

    return check


def regex(name: str, value: Any) -> None:
    """A structure group or regular expression."""
    if not isinstance(value, str):
        raise invalid(name, value, "a string (a structure group or a regex)")
    if _compiles.get():
        compile_pattern(name, value)


def patterns(name: str, value: Any) -> None:
    """A regex for full layer names, or a list of names and suffixes."""
    if isinstance(value, str):
        return regex(name, value)
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise invalid(name, value, "a regex, or a list of exact layer names and suffixes")
    layer_names(name, value)


def reason(name: str, value: Any) -> None:
    """A text that explains why something was done."""
    if not isinstance(value, str):
        raise invalid(name, value, "a reason, as a string")


def layer_name(name: str, value: Any) -> None:
    """The name of a layer or parameter."""
    if not isinstance(value, str) or len(value) > MAX_NAME_LENGTH:
        raise invalid(name, value, f"a layer name of up to {MAX_NAME_LENGTH:,} characters")


def layer_names(name: str, values: Iterable[Any]) -> None:
    """Names of layers or parameters, of limited number."""
    for count, layer in enumerate(values):
        layer_name(name, layer)
        if count >= MAX_ENTRIES:
            raise ValueError(f"invalid {name}: expected up to {MAX_ENTRIES:,} names; remove some")


def by_layer(of_value: Check) -> Check:
    """A dict from the name of a layer or parameter to checked values."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise invalid(name, value, "a dict with the names of layers as keys")
        layer_names(name, value)
        for layer, entry in value.items():
            of_value(f"{name}[{layer!r}]", entry)

    return check


def layer_chunks(name: str, value: Any) -> None:
    """A number of layers per chunk, or the names of the layers of each chunk."""
    if is_int(value) and value >= 1:
        return
    chunks = value if isinstance(value, list | tuple) else []
    are_lists = all(isinstance(chunk, list | tuple) for chunk in chunks)
    names = [layer for chunk in chunks for layer in chunk] if are_lists else []
    if not names or not all(isinstance(layer, str) for layer in names):
        expected = "a number of layers per chunk (1: no sharing), or a list of lists of layer names"
        raise invalid(name, value, expected)
    layer_names(name, names)
    if repeated := sorted(layer for layer, count in Counter(names).items() if count > 1):
        raise ValueError(
            f"invalid {name}={shown(value)}: {repeated[0]!r} is listed more than once; remove one"
        )
