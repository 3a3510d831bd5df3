"""The parser of all commands."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Container
from inspect import getdoc

from ..argument_parsing import HelpFormatter, OneLineErrors, add_traceback_argument
from ..version import __version__
from .command import COMMANDS, Command


class ExamplesFormatter(HelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the examples as they are written."""


def examples_text(command: type[Command]) -> str:
    """Return the end of a help: the examples of a command."""
    return "\n  ".join(["examples:", *command.examples])


def build_parser(words: Container[str] = COMMANDS, completes: bool = False) -> ArgumentParser:
    """Return the parser of all commands; only those in ``words`` have their arguments.

    Parsed arguments have ``command``, the class of the command, and ``parser``.

    Args:
        words: names of commands.
        completes: return the parser for shell completion, which also has the flags of tasks.
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
            epilog=examples_text(command),
            formatter_class=ExamplesFormatter,
            parents=[parent() for parent in command.parents] if is_used else [],
        )
        if is_used:
            (command.add_completion if completes else command.add_arguments)(subparser)
        add_traceback_argument(subparser)
        subparser.set_defaults(command=command, parser=subparser)
    return parser
