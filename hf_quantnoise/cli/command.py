"""Base class and registry of the commands, and flags that several of them have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import ClassVar

from ..registry import Registry


class UsageError(ValueError):
    """Invalid or conflicting flags: exit code 2."""


class Command(ABC):
    """A command of ``hf-quantnoise``. The first paragraph of its docstring is its help."""

    examples: ClassVar[tuple[str, ...]]  # shown at the end of --help; a test runs them
    parents: ClassVar[tuple[Callable[[], ArgumentParser], ...]] = ()  # parsers with shared flags

    @staticmethod
    @abstractmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Add the arguments of the command."""

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
        action="store_true",
        help="Run the model's own code, which is stored with it (auto_map in config.json).",
    )


def add_output_arguments(parser: ArgumentParser) -> None:
    """Add ``out`` and ``overwrite``: the folder that a command writes."""
    parser.add_argument("out", metavar="OUT", help="Output folder.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the model in OUT.")
