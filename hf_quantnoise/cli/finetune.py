"""``hf-quantnoise finetune``."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser, Namespace
from importlib import import_module
from types import ModuleType

from .command import COMMANDS, Command, UsageError

TASKS = {
    "glue": "text classification (sentences or pairs)",
    "clm": "causal language modeling",
    "images": "image classification",
}


@COMMANDS.register("finetune")
class Finetune(Command):
    """Finetune with quantization noise, compress in stages, save and check the result.

    The same as examples/run_glue.py, run_clm.py and run_image_classification.py. Requires
    pip install 'hf-quantnoise[examples]'.
    """

    examples = (
        "hf-quantnoise finetune images --help",
        "hf-quantnoise finetune glue --model_name_or_path out/dense --train_file train.csv "
        "--validation_file dev.csv --noise int4 --scheme fixed_point --bits 4 --output_dir run",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        tasks = "; ".join(f"{name}: {text}" for name, text in TASKS.items())
        parser.add_argument("task", choices=list(TASKS), help=f"Task to train. {tasks}.")
        parser.add_argument(
            "flags",
            nargs=REMAINDER,
            help="Flags of the task, or a JSON file of them; TASK --help lists them.",
        )

    @staticmethod
    def run(args: Namespace) -> None:
        example = task_module(args.task).example
        args.parser.prog += f" {args.task}"  # whose --help lists the flags
        try:
            parsed = example.parse(args.flags, prog=args.parser.prog)
        except ValueError as error:
            raise UsageError(str(error)) from error
        example.start(parsed)


def task_module(task: str) -> ModuleType:
    """Return the module of a task."""
    try:
        return import_module(f"..runs.{task}", __package__)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"finetune {task} requires {error.name}; run pip install 'hf-quantnoise[examples]'"
        ) from error
