"""``hf-quantnoise convert``."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from inspect import getdoc

from transformers import PreTrainedModel

from ..hub import AutoQuantizedModel
from ..registry import Registry
from .checkpoints import checkpoint_of
from .command import COMMANDS, Command, add_model_argument, add_output_arguments
from .folders import check_output, copy_companions, new_folder

# Name of a form -> what writes a packed model in it: (model, folder) -> None. Its docstring is what
# --help says of it. An error in it leaves nothing behind.
TARGETS: Registry[Callable[[PreTrainedModel, str], None]] = Registry("target")


@TARGETS.register("dense")
def to_dense(model: PreTrainedModel, folder: str) -> None:
    """a plain transformers model with the quantized values, as large as before compression"""
    model.dequantize().save_pretrained(folder)


@COMMANDS.register("convert")
class Convert(Command):
    """Writes a packed model in a form that those without this package read."""

    examples = (
        "hf-quantnoise convert out/compressed out/plain --to dense",
        "hf-quantnoise convert out/compressed out/plain --to dense --overwrite",
        "hf-quantnoise convert out/compressed out/aqlm --to aqlm",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_model_argument(parser, "The packed model")
        add_output_arguments(parser)
        forms = "; ".join(f"{name}: {getdoc(TARGETS[name])}" for name in TARGETS)
        parser.add_argument(
            "--to", choices=list(TARGETS), required=True, help=f"The form. {forms}."
        )

    @staticmethod
    def run(args: Namespace) -> None:
        checkpoint = checkpoint_of(args)
        check_output(args.out, args.overwrite, args.model)
        model = AutoQuantizedModel.from_pretrained(args.model, revision=args.revision)
        with new_folder(args.out) as folder:
            TARGETS[args.to](model, folder)
            copy_companions(checkpoint, folder)
        print(f"{args.model} is {args.out} in the form {args.to!r}")
