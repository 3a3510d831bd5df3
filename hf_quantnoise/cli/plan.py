"""``hf-quantnoise plan``."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from .command import (
    COMMANDS,
    Command,
    add_model_argument,
    add_table_arguments,
    check_file,
    quantization_parser,
)


@COMMANDS.register("plan")
class Plan(Command):
    """Show how compress would store a model, and the exact size of the file.

    Nothing is quantized. Weights are loaded only with --target_size_mb or
    --target_bits_per_weight, to measure their quantization errors.
    """

    examples = (
        "hf-quantnoise plan out/dense --block_size ffn=8,embeddings=8,attention=4",
        "hf-quantnoise plan out/dense --scheme fixed_point --bits 4 --per layer",
        "hf-quantnoise plan out/dense --codebook_bits 16 --save plan.json",
    )
    parents = (quantization_parser,)

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_model_argument(parser, "Dense model")
        add_table_arguments(parser)
        parser.add_argument(
            "--save",
            metavar="FILE",
            help="Write the settings of each layer as JSON, for editing and `compress --config`.",
        )

    @staticmethod
    def run(args: Namespace) -> None:
        from ..compression import check_plan
        from ..configuration import IPQConfig
        from ..modeling.packer import ModelPacker
        from ..size import size_report
        from .checkpoints import checkpoint_of
        from .settings import quantization_config
        from .sizes import show

        config = quantization_config(args)
        check_file("--save", args.save)
        checkpoint = checkpoint_of(args)
        checkpoint.require_dense()
        model = checkpoint.skeleton()
        check_plan(model, config)
        if config.target is not None and not config.settings_by_name():
            from ..compression.bit_allocation.allocate import resolve_target

            progress = sys.stderr.isatty()
            config = resolve_target(checkpoint.load(), config, progress=progress, table=False)
        ModelPacker(model, config).pack_skeletons()
        show(size_report(model), args, config=config.to_dict())
        if args.save:
            if isinstance(config, IPQConfig):  # a plan can be used as its settings of single layers
                plan = {**config.layer_quantizers, **model.config.quantization_config.plan}
                config = replace(config, layer_quantizers=plan)
            Path(args.save).write_text(json.dumps(config.to_dict(), indent=2) + "\n", "utf-8")
            print(f"settings written to {args.save}", file=sys.stderr)
