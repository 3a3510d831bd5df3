"""Command lines: help with defaults, errors of one line, suggestions for misspelled words."""

from __future__ import annotations

import os
import re
import sys
import traceback
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from .registry import suggestion
from .text import printable

TRACEBACK = "--traceback"
_INVALID_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)$", re.DOTALL)


class UsageError(ValueError):
    """Invalid or conflicting flags: exit code 2."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Raise a ``ValueError`` as a :class:`UsageError`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag, except of optional values and switches."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.nargs == 0 and action.const is False:  # it has the help of the flag it negates
            return f"Same as --{action.dest} False."
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class OneLineErrors(ArgumentParser):
    """Argument parser whose errors are one line, with a suggestion for a misspelled word."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Keep the words, for errors."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line, without the list of all flags, and exit with 2."""
        listed = "flags" if self._subparsers is None else "commands and flags"
        more = f"({self.prog} --help lists all {listed})"
        self.exit(2, f"{self.prog}: error: {message}{self._hint(message)} {more}\n")

    def _hint(self, message: str) -> str:
        """Return a suggestion for an invalid choice, or for a flag in place of a missing one."""
        if found := _INVALID_CHOICE.search(message):
            return suggestion(found[1], [name.strip("'") for name in found[2].split(", ")])
        if "arguments are required" in message:
            known = self._option_string_actions
            for word in self._words:
                flag = word.partition("=")[0]
                if flag.startswith("--") and not any(name.startswith(flag) for name in known):
                    return f"; {unknown_flags([word], known)}"
        return ""


def add_traceback_argument(parser: ArgumentParser, **kwargs: Any) -> None:
    """Add ``--traceback``."""
    parser.add_argument(TRACEBACK, action="store_true", help="Show error tracebacks.", **kwargs)


def unknown_flags(words: Iterable[str], known: Iterable[str]) -> str:
    """Return the error message for words that are not flags, with a suggestion for the first."""
    words = list(words)
    names = [name for name in known if "-" not in name[2:]]  # --block-size is --block_size
    hint = suggestion(words[0].partition("=")[0], names)
    return f"unrecognized arguments: {' '.join(words)}{hint}"


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line, with the type if it is not an expected one."""
    text = printable(" ".join(str(error).split()))
    expected = isinstance(error, OSError | ValueError | TypeError | ImportError)
    return text if text and expected else f"{type(error).__name__}: {text}"


def _reader_is_gone() -> bool:
    """Whether stdout is a closed pipe, from which stdout is then detached.

    Python flushes stdout again at exit (documentation of ``signal``, "Note on SIGPIPE").
    """
    try:
        print(flush=True)  # a line, as what was to be flushed may be lost
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def exit_code(
    run: Callable[[], object], parser: ArgumentParser, with_traceback: Callable[[], bool]
) -> int:
    """Run a program; return 0, or 1 after an error, which is printed as one line on stderr.

    A :class:`UsageError` exits with 2, as an error of the parser. After an interruption 130 is
    returned. If the reader of stdout has closed it (``| head``), 1 is returned and nothing printed.

    Args:
        run: the program.
        parser: has its name and help.
        with_traceback: returns whether to print the traceback, too.
    """
    try:
        run()
        sys.stdout.flush()  # here, so that a closed pipe is found here
    except UsageError as error:
        parser.error(one_line(error))
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        if with_traceback():
            traceback.print_exc()
        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
