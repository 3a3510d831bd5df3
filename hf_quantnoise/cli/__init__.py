"""``hf-quantnoise``: the command line.

A command is a class in a file of its own here; :data:`COMMANDS` knows them all.
"""

from __future__ import annotations

import sys
import traceback
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from inspect import getdoc
from typing import NoReturn

from . import compress, convert, exports, finetune, plan, push, report  # noqa: F401, I001
from .command import COMMANDS, Command, UsageError

__all__ = ["COMMANDS", "Command", "UsageError", "build_parser", "main"]

NAME = "hf-quantnoise"


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults behind the help of each flag, examples as they are written."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the list of all flags."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help lists what there is)\n")


def build_parser() -> ArgumentParser:
    """The parser of all commands. Parsed arguments have ``command``, the class, and ``parser``."""
    parser = _Parser(
        prog=NAME, description="Small Hugging Face models, by quantization noise and iPQ."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name in COMMANDS:
        command = COMMANDS[name]
        text = getdoc(command) or ""
        own = commands.add_parser(
            name,
            help=" ".join(text.partition("\n\n")[0].split()),
            description=text,
            epilog="\n  ".join(["examples:", *command.examples]),
            formatter_class=_Formatter,
            parents=command.parents(),
        )
        command.add_arguments(own)
        own.add_argument("--traceback", action="store_true", help="Show where an error came from.")
        own.set_defaults(command=command, parser=own)
    return parser


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = isinstance(error, OSError | ValueError | TypeError | ImportError)
    return text if text and expected else f"{type(error).__name__}: {text}"


def main(argv: Sequence[str] | None = None) -> int:
    """Carries out a command line.

    Args:
        argv: the words after ``hf-quantnoise``; None takes the process's own.

    Returns:
        0 where it was carried out, 1 where that failed, with one line on stderr.

    Raises:
        SystemExit: with 2 for a command line that makes no sense, with 0 after ``--help``.
    """
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:  # said by the command, whose --help lists its flags
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        args.command.run(args)
    except UsageError as error:
        args.parser.error(_one_line(error))
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        print(f"{args.parser.prog}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0
