"""What a command is: a class in a file of its own, entered by a decorator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from typing import ClassVar

from ..registry import Registry


class UsageError(ValueError):
    """Flags that contradict each other, or a value that is none of its flag's: exit code 2."""


class Command(ABC):
    """One word after ``hf-quantnoise``. The docstring's first paragraph is its help.

    Attributes:
        examples: command lines that ``--help`` ends with; a test runs them.
    """

    examples: ClassVar[tuple[str, ...]]

    @staticmethod
    def parents() -> list[ArgumentParser]:
        """Parsers whose flags the command has too."""
        return []

    @staticmethod
    @abstractmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Adds the command's own arguments."""

    @staticmethod
    @abstractmethod
    def run(args: Namespace) -> None:
        """Carries it out. Results go to stdout, all else to stderr.

        Raises:
            UsageError: for exit code 2.
            Exception: any other, for exit code 1.
        """


COMMANDS: Registry[type[Command]] = Registry("command")


def add_model_argument(parser: ArgumentParser, kind: str) -> None:
    """The model a command reads: ``model`` and ``revision`` of the arguments."""
    parser.add_argument(
        "model", metavar="PATH_OR_REPO", help=f"{kind}: a folder, or a repository of the Hub."
    )
    parser.add_argument("--revision", default=None, help="Branch, tag or commit of the repository.")


def add_output_arguments(parser: ArgumentParser) -> None:
    """The folder a command writes: ``out`` and ``overwrite`` of the arguments."""
    parser.add_argument("out", metavar="OUT", help="Folder for the new model.")
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace the saved model that OUT holds."
    )
