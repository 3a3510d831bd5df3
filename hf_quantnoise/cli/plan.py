"""``hf-quantnoise plan``."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace

from ..compression import check_plan
from ..configuration import IPQConfig, QuantizedModelConfig
from ..configuration.layer_quantizers import checked_layer_quantizers
from ..modeling.packer import ModelPacker
from ..size import size_report
from .checkpoints import checkpoint_of
from .command import COMMANDS, Command, add_model_argument
from .folders import check_file
from .settings import quantization_config, quantization_parser, with_allocated_bits
from .sizes import add_table_arguments, show


@COMMANDS.register("plan")
class Plan(Command):
    """Show how compress would store each layer, and the exact size of the file.

    Nothing is quantized. Weights are loaded only with --target_size_mb or
    --target_bits_per_weight, to measure their quantization errors.
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
        add_model_argument(parser, "Dense model")
        add_table_arguments(parser, per="layer")
        parser.add_argument(
            "--save",
            metavar="FILE",
            help="Write the settings of each layer as JSON, for editing and `compress --config`.",
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
            config = with_allocated_bits(checkpoint.load(), config)
        ModelPacker(model, config).pack_skeletons()
        show(size_report(model), args, config=config.to_dict())
        if args.save:
            _save(_by_layer(config, model.config.quantization_config), args.save)


def _by_layer(config: QuantizedModelConfig, packed: QuantizedModelConfig) -> QuantizedModelConfig:
    """Return the config with the settings of each layer, if its scheme supports them."""
    if not isinstance(config, IPQConfig):
        return config
    return replace(config, layer_quantizers=checked_layer_quantizers("plan", packed.plan))


def _save(config: QuantizedModelConfig, file_name: str) -> None:
    with open(file_name, "w", encoding="utf-8") as file:
        json.dump(config.to_dict(), file, indent=2)
        file.write("\n")
    print(f"settings written to {file_name}", file=sys.stderr)
