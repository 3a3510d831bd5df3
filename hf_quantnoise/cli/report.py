"""``hf-quantnoise report``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from ..text import printable
from .command import COMMANDS, Command, add_model_argument, add_table_arguments, check_file


@COMMANDS.register("report")
class Report(Command):
    """Show the size of a packed or dense model, and how each layer is stored.

    Only config.json and the headers of the safetensors files are read, also from the Hub.
    """

    examples = (
        "hf-quantnoise report out/compressed",
        "hf-quantnoise report out/compressed --per layer --png sizes.png",
        "hf-quantnoise report out/dense --json",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_model_argument(parser, "Model")
        add_table_arguments(parser)
        parser.add_argument("--png", metavar="FILE", help="Plot the sizes (requires matplotlib).")

    @staticmethod
    def run(args: Namespace) -> None:
        check_file("--png", args.png)
        from .checkpoints import checkpoint_of
        from .sizes import draw, report_of, show

        report, note = report_of(checkpoint_of(args))
        show(report, args, note=note)
        if note and not args.json:
            print(f"note: {printable(note)}", file=sys.stderr)
        if args.png:
            draw(report, args.per, args.model, args.png)
