"""Killing a pass at a chosen moment."""

import pytest
from support.stage_runs import Killed


@pytest.fixture
def kill(monkeypatch):
    """Makes a function raise at its n-th call; returns what mends it."""

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
