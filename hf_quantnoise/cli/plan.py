"""``hf-quantnoise plan``."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields, replace

from ..compression import check_plan
from ..configuration import QuantizedModelConfig
from ..configuration.layer_quantizers import checked_layer_quantizers
from ..modeling.packer import ModelPacker
from ..size import size_report
from .checkpoints import checkpoint_of
from .command import COMMANDS, Command, add_model_argument
from .folders import check_file
from .settings import allotted, quantization_config, quantization_parser
from .sizes import add_table_arguments, show


@COMMANDS.register("plan")
class Plan(Command):
    """What compress would make of each layer, and the size of the file, to the byte.

    Nothing is quantized. Weights are read only for --target_size_mb and --target_bits_per_weight,
    which are shared out by quantization errors.
    """

    examples = (
        "hf-quantnoise plan out/dense --block_size ffn=8,embeddings=8,attention=4",
        "hf-quantnoise plan out/dense --scheme fixed_point --bits 4 --per group",
        "hf-quantnoise plan out/dense --codebook_bits 16 --save plan.json",
    )

    @staticmethod
    def parents() -> list[ArgumentParser]:
        return [quantization_parser()]

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_model_argument(parser, "The dense model")
        add_table_arguments(parser, per="layer")
        parser.add_argument(
            "--save",
            metavar="FILE",
            help="Write the settings, layer by layer, to edit and give to `compress --config`.",
        )

    @staticmethod
    def run(args: Namespace) -> None:
        config = quantization_config(args)
        check_file("--save", args.save)
        checkpoint = checkpoint_of(args)
        checkpoint.require_dense()
        model = checkpoint.skeleton()
        check_plan(model, config)
        if config.target is not None and not config.settings_by_name():
            config = allotted(checkpoint.load(), config)
        ModelPacker(model, config).pack_skeletons()
        report = size_report(model)
        show(report, args, config=config.to_dict())
        if args.save:
            _save(_by_layer(config, model.config.quantization_config), args.save)


def _by_layer(config: QuantizedModelConfig, packed: QuantizedModelConfig) -> QuantizedModelConfig:
    """The config with each layer of the plan by name, where its scheme has such settings."""
    if "layer_quantizers" not in {field.name for field in fields(config)}:
        return config
    return replace(config, layer_quantizers=checked_layer_quantizers("plan", packed.plan))


def _save(config: QuantizedModelConfig, file_name: str) -> None:
    with open(file_name, "w", encoding="utf-8") as file:
        json.dump(config.to_dict(), file, indent=2)
        file.write("\n")
    print(f"settings in {file_name}", file=sys.stderr)
