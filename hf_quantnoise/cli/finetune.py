"""``hf-quantnoise finetune``."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser, Namespace
from importlib import import_module
from types import ModuleType

from .command import COMMANDS, Command, UsageError

TASKS = {
    "glue": "a classifier of sentences, or of pairs",
    "clm": "a causal language model",
    "images": "a classifier of images",
}


@COMMANDS.register("finetune")
class Finetune(Command):
    """Finetunes with quantization noise, compresses in stages, saves and checks the result.

    What examples/run_glue.py, run_clm.py and run_image_classification.py do. Needs pip install
    'hf-quantnoise[examples]'.
    """

    examples = (
        "hf-quantnoise finetune images --help",
        "hf-quantnoise finetune glue --model_name_or_path out/dense --train_file train.csv "
        "--validation_file dev.csv --noise int4 --scheme fixed_point --bits 4 --output_dir run",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
        parser.add_argument("task", choices=list(TASKS), help=f"What to train. {tasks}.")
        parser.add_argument(
            "flags", nargs=REMAINDER, help="Flags of the task, or a JSON file; TASK --help."
        )

    @staticmethod
    def run(args: Namespace) -> None:
        example = task_module(args.task).example
        args.parser.prog += f" {args.task}"  # whose --help lists the flags
        try:
            given = example.parse(args.flags, prog=args.parser.prog)
        except ValueError as error:
            raise UsageError(str(error)) from error
        example.start(given)


def task_module(task: str) -> ModuleType:
    """The module of a task.

    Raises:
        ImportError: naming the extra, where a package that it needs is missing.
    """
    try:
        return import_module(f"..runs.{task}", __package__)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"finetune {task} needs {error.name}: pip install 'hf-quantnoise[examples]'"
        ) from error
