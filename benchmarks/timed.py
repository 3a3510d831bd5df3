"""Seconds of the parts of a run, measured by wrapping the functions that do them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock


@contextmanager
def timed(parts: dict[str, list[tuple[Any, str]]]) -> Iterator[dict[str, float]]:
    """Measure functions while the context lasts; yield the seconds of each part.

    A function that another measured one calls counts for its own part only, so that the parts of a
    run add up to at most its time.

    Args:
        parts: part -> its functions, each an owner (class or module) and a name.
    """
    seconds = dict.fromkeys(parts, 0.0)
    inner = [0.0]  # seconds of the measured functions that each active one has called

    def wrapped(part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                seconds[part] += spent - inner.pop()
                inner[-1] += spent

        return run

    with ExitStack() as stack:
        for part, functions in parts.items():
            for owner, name in functions:
                wrapper = wrapped(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, wrapper))
        yield seconds
