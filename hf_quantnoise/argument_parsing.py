"""Command lines: help with defaults, errors of one line."""

from __future__ import annotations

from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Iterable
from typing import NoReturn

from .registry import suggestion


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag, except of optional values and switches."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class OneLineErrors(ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line, without the list of all flags, and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists all flags)\n")


def unknown_flags(words: Iterable[str], known: Iterable[str]) -> str:
    """Return the error message for words that are not flags, with a suggestion for the first."""
    words = list(words)
    names = [name for name in known if "-" not in name[2:]]  # --block-size is --block_size
    hint = suggestion(words[0].partition("=")[0], names)
    return f"unrecognized arguments: {' '.join(words)}{hint}"
