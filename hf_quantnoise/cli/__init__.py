"""``hf-quantnoise``: the command line.

Each command is a class in its own file here; :data:`COMMANDS` has all of them.
"""

from __future__ import annotations

import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Container, Sequence
from inspect import getdoc

from ..argument_parsing import HelpFormatter, OneLineErrors, unknown_flags
from ..text import printable
from ..version import __version__
from . import compress, convert, finetune, plan, push, report  # noqa: F401
from .command import COMMANDS, Command, UsageError

__all__ = ["COMMANDS", "Command", "UsageError", "build_parser", "main"]


class _Formatter(HelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the examples as they are written."""


def build_parser(words: Container[str] = COMMANDS) -> ArgumentParser:
    """Return the parser of all commands; only those in ``words`` have their arguments.

    Parsed arguments have ``command``, the class of the command, and ``parser``.
    """
    parser = OneLineErrors(
        prog="hf-quantnoise",
        description="Compress Hugging Face models with quantization noise and product "
        "quantization.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        command, is_used = COMMANDS[name], name in words
        text = getdoc(command) or ""
        subparser = commands.add_parser(
            name,
            help=" ".join(text.partition("\n\n")[0].split()),
            description=text,
            epilog="\n  ".join(["examples:", *command.examples]),
            formatter_class=_Formatter,
            parents=[parent() for parent in command.parents] if is_used else [],
        )
        if is_used:
            command.add_arguments(subparser)
        subparser.add_argument("--traceback", action="store_true", help="Show error tracebacks.")
        subparser.set_defaults(command=command, parser=subparser)
    return parser


def _one_line(error: Exception) -> str:
    text = printable(" ".join(str(error).split()))
    expected = isinstance(error, OSError | ValueError | TypeError | ImportError)
    return text if text and expected else f"{type(error).__name__}: {text}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return 0, or 1 after an error, which is printed as one line on stderr.

    ``argv=None`` uses the words of the process. Exits with 2 if they are invalid.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = build_parser(argv).parse_known_args(argv)
    if unknown:  # reported by the parser of the command, whose --help lists its flags
        args.parser.error(unknown_flags(unknown, args.parser._option_string_actions))
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
