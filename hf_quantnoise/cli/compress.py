"""``hf-quantnoise compress``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from .command import (
    COMMANDS,
    Command,
    UsageError,
    add_model_argument,
    add_output_arguments,
    quantization_parser,
)


@COMMANDS.register("compress")
class Compress(Command):
    """Quantize a model in one shot, without data or training, and save it.

    The tokenizer or processor is copied, and a model card is written. Training keeps more of the
    quality: see finetune --recipe, or QuantNoiseTrainer.
    """

    examples = (
        "hf-quantnoise compress out/dense out/small --block_size 8 --codebook_bits 16",
        "hf-quantnoise compress out/dense out/int4 --scheme fixed_point --bits 4",
        "hf-quantnoise compress out/dense out/small --config plan.json --overwrite",
    )
    parents = (quantization_parser,)

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_model_argument(parser, "Dense model")
        add_output_arguments(parser)
        parser.add_argument(
            "--card_template",
            "--card-template",
            metavar="FILE",
            help="Jinja template of the model card.",
        )

    @staticmethod
    def run(args: Namespace) -> None:
        from ..compression import check_plan, quantize_model
        from ..compression.bit_allocation.allocate import resolve_target
        from ..files.model_folders import replaced_model
        from ..publishing.template import read_template
        from ..repository import card_in
        from ..size import size_report
        from .checkpoints import checkpoint_of
        from .folders import check_output, copy_companions, write_card
        from .settings import quantization_config

        config = quantization_config(args)
        if field := config.reads_data:
            raise UsageError(
                f"--{field} {getattr(config, field)} needs calibration data, which this command "
                "does not load; remove it, or call quantize_model(model, config, "
                "calibration_data=[...]) in Python"
            )
        read_template(args.card_template)
        checkpoint = checkpoint_of(args)
        checkpoint.require_dense()
        old = check_output(args.out, args.overwrite, args.model)
        card_in(args.model)  # raises before the model is loaded
        check_plan(checkpoint.skeleton(), config)
        model = checkpoint.load()
        progress = sys.stderr.isatty()
        config = resolve_target(model, config, progress=progress, table=False)
        model = quantize_model(model, config, progress)
        with replaced_model(args.out, old) as folder:
            source = copy_companions(checkpoint, folder)
            model.save_pretrained(folder)
            write_card(model, source, folder, args.card_template)
        print(size_report(model))
