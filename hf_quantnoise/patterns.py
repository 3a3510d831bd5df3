"""Regular expressions of a config: compiled with errors that name field and value."""

from __future__ import annotations

import re

from .text import shown


def compile_pattern(name: str, value: str) -> re.Pattern[str]:
    """Return the compiled regex of a field; raise ValueError if it is invalid or too complex."""
    try:
        return re.compile(value)
    except (re.error, OverflowError) as error:  # OverflowError: a{99999999999}
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    raise ValueError(f"invalid {name}={shown(value)}: expected a regular expression ({reason})")
