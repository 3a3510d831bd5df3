"""``hf-quantnoise convert``."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from inspect import getdoc
from typing import TYPE_CHECKING

from ..registry import Registry
from ..text import printable
from .command import COMMANDS, Command, add_model_argument, add_output_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Format -> function that writes a packed model in it: (model, folder) -> None. Its docstring is its
# help. If it raises, the output folder is not changed.
TARGETS: Registry[Callable[[PreTrainedModel, str], None]] = Registry("format")


@TARGETS.register("dense")
def to_dense(model: PreTrainedModel, folder: str) -> None:
    """a regular transformers model with the quantized values, as large as before compression"""
    model.dequantize().save_pretrained(folder)


@TARGETS.register("aqlm")
def to_aqlm(model: PreTrainedModel, folder: str) -> None:
    """for transformers with aqlm installed; layers that do not fit its layout are written dense"""
    from ..export import export_aqlm

    for name, reason in export_aqlm(model, folder).dense.items():
        print(printable(f"{name}: dense, {reason}"))


@TARGETS.register("onnx")
def to_onnx(model: PreTrainedModel, folder: str) -> None:
    """for onnxruntime, transformers.js and optimum; not for encoder-decoder models"""
    from ..export import export_onnx

    export_onnx(model, folder)


@TARGETS.register("onnx_int8")
def to_onnx_int8(model: PreTrainedModel, folder: str) -> None:
    """the same with products of 8-bit integers, which is faster and less accurate"""
    from ..export import export_onnx

    for name, reason in export_onnx(model, folder, dtype="int8").not_int8.items():
        print(printable(f"{name}: float32 products, {reason}"))


@COMMANDS.register("convert")
class Convert(Command):
    """Write a packed model in a format that does not need this package."""

    examples = (
        "hf-quantnoise convert out/compressed out/plain --to dense",
        "hf-quantnoise convert out/compressed out/plain --to dense --overwrite",
        "hf-quantnoise convert out/compressed out/aqlm --to aqlm",
    )

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_model_argument(parser, "Packed model")
        add_output_arguments(parser)
        formats = "; ".join(f"{name}: {getdoc(TARGETS[name])}" for name in TARGETS)
        parser.add_argument(
            "--to", choices=list(TARGETS), required=True, help=f"Output format. {formats}."
        )

    @staticmethod
    def run(args: Namespace) -> None:
        from ..files.model_folders import replaced_model
        from .checkpoints import checkpoint_of
        from .folders import check_output, copy_companions

        checkpoint = checkpoint_of(args)
        checkpoint.require_packed("PATH_OR_REPO")
        old = check_output(args.out, args.overwrite, args.model)
        model = checkpoint.load_packed()
        with replaced_model(args.out, old) as folder:
            copy_companions(checkpoint, folder)
            TARGETS[args.to](model, folder)
        print(f"{args.model} written as {args.to!r} to {_weights_in(args.out)}")


def _weights_in(folder: str) -> str:
    """Return the files of weights in a folder, with their sizes."""
    from ..files.durable import files_of

    paths = [os.path.join(folder, name) for name in sorted(files_of(folder))]
    files = [path for path in paths if path.endswith((".safetensors", ".onnx"))]
    return ", ".join(f"{path} ({os.path.getsize(path) / 1e6:.3f} MB)" for path in files)
