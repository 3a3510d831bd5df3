"""Errors of loading a model, with the flag or the name that they belong to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..repository import is_repository_name, missing_model


@contextmanager
def errors_name_model(start: str, name: str) -> Iterator[None]:
    """Raise errors of loading a model as a ``ValueError``: a start, the name and the reason.

    What a model lacks that was read is the reason itself, not that it is missing.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        was_read = not isinstance(error, OSError) and is_repository_name(name)
        reason = error if was_read or os.path.isdir(name) else missing_model(name, error)
        raise ValueError(f"{start} {name!r}: {reason}") from error
