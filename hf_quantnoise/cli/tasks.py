"""The tasks that examples run: each has its own flags."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

TASKS = {
    "glue": "text classification (sentences or pairs)",
    "clm": "causal language modeling",
    "images": "image classification",
}


def add_task_arguments(parser: ArgumentParser, verb: str) -> None:
    """Add ``task`` and ``flags``."""
    tasks = "; ".join(f"{name}: {text}" for name, text in TASKS.items())
    parser.add_argument("task", choices=list(TASKS), help=f"Task to {verb}. {tasks}.")
    parser.add_argument(
        "flags",
        nargs=REMAINDER,
        help="Flags of the task, or a JSON file of them; TASK --help lists them.",
    )


def add_task_parsers(parser: ArgumentParser, make: Callable[[Any], ArgumentParser]) -> None:
    """Add a subparser for each task whose packages are installed, for shell completion.

    Args:
        parser: of the command.
        make: returns the parser of an example, without help.
    """
    tasks = parser.add_subparsers(metavar="TASK")
    for name, text in TASKS.items():
        try:
            example = task_module(name, "completion").example
        except ImportError:
            tasks.add_parser(name, help=text)
        else:
            tasks.add_parser(name, help=text, parents=[make(example)])


def task_module(task: str, command: str) -> ModuleType:
    """Return the module of a task.

    Raises:
        ImportError: if a package is missing; names the command.
    """
    try:
        return import_module(f"..runs.{task}", __package__)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{command} {task} requires {error.name}; run pip install 'hf-quantnoise[examples]'"
        ) from error
