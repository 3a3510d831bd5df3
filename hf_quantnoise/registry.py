"""A table of named objects, filled by a decorator."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_LENGTH = 100  # of a name that is compared with the known ones


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, or an empty string."""
    if not isinstance(name, str) or len(name) > MAX_LENGTH:
        return ""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Maps names to objects (classes or functions) of a kind, which error messages name.

    Args:
        kind: the kind.
        filled_by: subpackage that registers the objects; imported before the first look-up.
    """

    def __init__(self, kind: str, filled_by: str | None = None) -> None:
        self.kind = kind
        self._registered: dict[str, T] = {}
        self._filled_by = filled_by

    @property
    def _entries(self) -> dict[str, T]:
        if self._filled_by is not None:
            import_module(f".{self._filled_by}", __package__)
            self._filled_by = None  # torch.compile cannot trace an import
        return self._registered

    def register(self, *names: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under names that are not registered yet."""

        def enter(entry: T) -> T:
            for name in names:
                if name in self._registered:
                    raise ValueError(f"{self.kind} {name!r} is registered already")
                self._registered[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise ValueError(self.unknown(name)) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def unknown(self, name: object) -> str:
        """Return the error message for a name that is not registered."""
        known = ", ".join(self._entries)
        return f"unknown {self.kind} {name!r}, known: {known}{suggestion(name, self._entries)}"
