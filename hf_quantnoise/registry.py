"""A named table that new kinds join by a decorator; every ``unknown name`` error reads the same."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects (classes or functions).

    Args:
        what: what the entries are, for error messages (``"noise"``, ``"quantizer scheme"``).
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that enters the object under each of ``names``.

        Raises:
            ValueError: if a name is taken.
        """

        def enter(obj: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.what} {name!r} is registered already")
                self._entries[name] = obj
            return obj

        return enter

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise ValueError(self.unknown(name)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def unknown(self, name: object) -> str:
        """The error message for a name that is not in the table."""
        close = difflib.get_close_matches(str(name), self._entries, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"unknown {self.what} {name!r}; known: {', '.join(self._entries)}.{hint}"
