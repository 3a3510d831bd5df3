"""Command lines of scripts: dataclasses as flags, errors of one line without tracebacks."""

from __future__ import annotations

import sys
from argparse import SUPPRESS
from collections.abc import Callable
from typing import Any

from transformers import HfArgumentParser

from ..argument_parsing import (
    TRACEBACK,
    HelpFormatter,
    OneLineErrors,
    add_traceback_argument,
    exit_code,
    unknown_flags,
)


class ScriptParser(OneLineErrors, HfArgumentParser):
    """Parser of dataclasses. ``--traceback`` is a flag for :func:`run_script`."""

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, **{"formatter_class": HelpFormatter, **kwargs})
        add_traceback_argument(self, default=SUPPRESS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all flags except ``--traceback``."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([word for word in words if word != TRACEBACK], namespace)

    def parse_args_into_dataclasses(  # type: ignore[override]
        self, args: Any = None, return_remaining_strings: bool = False, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Parse flags; unknown ones are a usage error with a suggestion, unless returned."""
        *parts, unknown = super().parse_args_into_dataclasses(args, True, **kwargs)
        if return_remaining_strings:
            return (*parts, unknown)
        if unknown:
            self.error(unknown_flags(unknown, self._option_string_actions))
        return tuple(parts)


def run_script(run: Callable[[], object], parser: ScriptParser) -> int:
    """Run the script of the process; return :func:`~.argument_parsing.exit_code`."""
    return exit_code(run, parser, lambda: TRACEBACK in sys.argv)
