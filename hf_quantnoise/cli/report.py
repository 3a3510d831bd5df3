"""``hf-quantnoise report``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from .checkpoints import checkpoint_of
from .command import COMMANDS, Command, add_model_argument
from .folders import check_file
from .sizes import add_table_arguments, draw, report_of, show


@COMMANDS.register("report")
class Report(Command):
    """How large a model is and how each layer is stored, packed or dense.

    Of a repository only config.json and the headers of its safetensors files are read.
    """

    examples = (
        "hf-quantnoise report out/compressed",
        "hf-quantnoise report out/compressed --per layer --png sizes.png",
        "hf-quantnoise report out/dense --json",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_model_argument(parser, "The model")
        add_table_arguments(parser, per="group")
        parser.add_argument("--png", metavar="FILE", help="Draw it as well; needs matplotlib.")

    @staticmethod
    def run(args: Namespace) -> None:
        check_file("--png", args.png)
        report, note = report_of(checkpoint_of(args))
        show(report, args, note=note)
        if note and not args.json:
            print(f"note: {note}", file=sys.stderr)
        if args.png:
            draw(report, args.per, args.model, args.png)
