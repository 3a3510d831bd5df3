"""``hf-quantnoise``: the command line.

Each command is a class in its own file here; :data:`COMMANDS` has all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..argument_parsing import UsageError, exit_code, unknown_flags
from . import completion, compress, convert, evaluate, finetune, plan, push, report  # noqa: F401
from .command import COMMANDS, Command
from .parser import build_parser

__all__ = ["COMMANDS", "Command", "UsageError", "build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit code, see :func:`~.argument_parsing.exit_code`.

    ``argv=None`` uses the words of the process. Exits with 2 if they cannot be parsed.
    """
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = build_parser(argv).parse_known_args(argv)
    if unknown:  # reported by the parser of the command, whose --help lists its flags
        args.parser.error(unknown_flags(unknown, args.parser._option_string_actions))
    return exit_code(lambda: args.command.run(args), args.parser, lambda: args.traceback)
