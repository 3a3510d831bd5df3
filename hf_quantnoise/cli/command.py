"""Base class and registry of the commands, and flags that several of them have.

What a command needs in order to run is imported when it runs: most of the time of a short command
would be spent on imports.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, ClassVar

from ..argument_parsing import UsageError
from ..registry import Registry
from .flags import add_stored, stored

__all__ = ["COMMANDS", "Command", "UsageError"]


class Command(ABC):
    """A command of ``hf-quantnoise``. The first paragraph of its docstring is its help."""

    examples: ClassVar[tuple[str, ...]]  # shown at the end of --help; a test runs them
    parents: ClassVar[tuple[Callable[[], ArgumentParser], ...]] = ()  # parsers with shared flags

    @staticmethod
    @abstractmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the arguments of the command."""

    @classmethod
    def add_completion(cls, parser: ArgumentParser) -> None:
        """Add the arguments that a shell completes."""
        cls.add_arguments(parser)

    @staticmethod
    @abstractmethod
    def run(args: Namespace) -> None:
        """Run the command. Results go to stdout, everything else to stderr.

        A :class:`UsageError` exits with 2, any other exception with 1.
        """


COMMANDS: Registry[type[Command]] = Registry("command")


def add_model_argument(parser: ArgumentParser, kind: str) -> None:
    """Add ``model`` and what belongs to it: the model that a command reads."""
    parser.add_argument("model", metavar="PATH_OR_REPO", help=f"{kind}: folder or Hub repository.")
    parser.add_argument("--revision", default=None, help="Branch, tag or commit of the repository.")
    add_trust_argument(parser)


def add_trust_argument(parser: ArgumentParser) -> None:
    """Add ``trust_remote_code``."""
    parser.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="Run the model's own code, which is stored with it (auto_map in config.json).",
    )


def add_output_arguments(parser: ArgumentParser) -> None:
    """Add ``out`` and ``overwrite``: the folder that a command writes."""
    parser.add_argument("out", metavar="OUT", help="Output folder.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the model in OUT.")


class _RecipeFlag(Action):
    """``--recipe``, which only ``finetune`` has: an error that names it."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, flag: str | None = None
    ) -> None:
        parser.error(
            "--recipe is a flag of `hf-quantnoise finetune`, since a recipe trains the model; "
            "without training, choose the size with --block_size, or with --target_size_mb"
        )


def quantization_parser() -> ArgumentParser:
    """Return the flags of the compressed model, as a parent of a command's parser."""
    parser = ArgumentParser(add_help=False)
    add_stored(parser, stored()["compress"])
    parser.add_argument("--recipe", nargs="?", action=_RecipeFlag, help=SUPPRESS)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON file with all of these settings: the output of `plan --save`, or the "
        "config.json of a compressed model.",
    )
    return parser


def add_table_arguments(parser: ArgumentParser) -> None:
    """Add ``per`` and ``json``: the form of a report."""
    kinds = ["group", "layer"]
    parser.add_argument("--per", choices=kinds, default=kinds[0], help="Rows of the table.")
    parser.add_argument("--json", action="store_true", help="Print all rows as JSON, in bytes.")


def check_file(flag: str, path: str | None) -> None:
    """Raise a ``ValueError`` if a file cannot be written; called before any work is done."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder):
        reason = "is a folder" if os.path.isdir(path) else f"the folder {folder!r} does not exist"
        raise ValueError(f"invalid {flag} {path!r}: {reason}; pass a file in an existing folder")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"invalid {flag} {path!r}: no permission to write; choose another file")
