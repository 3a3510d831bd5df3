"""A fixture that interrupts a compression run at a chosen moment."""

import pytest
from support.trainers import Killed


@pytest.fixture
def kill(monkeypatch):
    """Return a function that makes ``target.name`` raise at its n-th call.

    It returns a function that undoes this.
    """

    def arrange(target, name, call):
        real, calls = getattr(target, name), []

        def counted(*args, **kwargs):
            calls.append(None)
            if len(calls) == call:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(target, name, counted)
        return lambda: monkeypatch.setattr(target, name, real)

    return arrange
