"""``hf-quantnoise finetune``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..argument_parsing import TRACEBACK
from .command import COMMANDS, Command
from .flags import check_names
from .tasks import add_task_arguments, add_task_parsers, task_module


@COMMANDS.register("finetune")
class Finetune(Command):
    """Finetune with quantization noise, compress in stages, save and check the result.

    The same as examples/run_glue.py, run_clm.py and run_image_classification.py. Requires
    pip install 'hf-quantnoise[examples]'.
    """

    examples = (
        "hf-quantnoise finetune glue --model_name_or_path roberta-base --task_name sst2 "
        "--recipe 13x --output_dir out",
        "hf-quantnoise finetune images --help",
        "hf-quantnoise finetune glue --model_name_or_path out/dense --train_file train.csv "
        "--validation_file dev.csv --noise int4 --scheme fixed_point --bits 4 --output_dir run",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_task_arguments(parser, "train")

    @classmethod
    def add_completion(cls, parser: ArgumentParser) -> None:
        add_task_parsers(parser, lambda example: example.parser(add_help=False))

    @staticmethod
    def run(args: Namespace) -> None:
        args.parser.prog += f" {args.task}"  # whose --help lists the flags
        args.traceback |= TRACEBACK in args.flags
        check_names(args.task, args.flags)
        example = task_module(args.task, "finetune").example
        example.run_words(args.flags, example.parser(args.parser.prog))
