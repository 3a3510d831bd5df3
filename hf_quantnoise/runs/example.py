"""An example script, and its command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..argument_parsing import usage_errors
from .arguments import Arguments, RunParser
from .compression_run import Run
from .job import Job
from .logs import set_up_logging
from .script import run_script


@dataclass(frozen=True)
class Example:
    """An example script: its data flags, its description and how it prepares a job."""

    data_class: type
    description: str
    prepare: Callable[[Arguments], Job]

    def parse(self, argv: list[str] | None = None, prog: str | None = None) -> Arguments:
        """Parse a command line; ``argv`` and ``prog`` default to those of the process."""
        return self.parser(prog).parse(sys.argv[1:] if argv is None else list(argv))

    def parser(self, prog: str | None = None, **kwargs: Any) -> RunParser:
        """Return the parser of the example's command line."""
        return RunParser(self.data_class, description=self.description, prog=prog, **kwargs)

    def run(self, args: Arguments) -> dict:
        """Run a command line; return the content of ``results.json``."""
        return Run(args, self.prepare).carry_out()

    def start(self, args: Arguments) -> dict:
        """Run a command line with logs on the console."""
        set_up_logging(args.training)
        return self.run(args)

    def main(self, argv: list[str] | None = None) -> dict:
        return self.start(self.parse(argv))

    def run_words(self, words: list[str], parser: RunParser) -> None:
        """Run a command line; raise a :class:`~.argument_parsing.UsageError` if it is invalid."""
        with usage_errors():
            args = parser.parse(words)
        self.start(args)

    def script(self) -> int:
        """Run the command line of the process; return the exit code."""
        parser = self.parser()
        return run_script(lambda: self.run_words(sys.argv[1:], parser), parser)
