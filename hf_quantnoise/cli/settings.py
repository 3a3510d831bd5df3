"""The flags that say how a model is to be stored, of every command that quantizes or plans to."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields, replace

from transformers import HfArgumentParser, PreTrainedModel

from ..compression.bit_allocation.allocate import plan_bit_allocation
from ..configuration import QuantizedModelConfig
from ..configuration.flags import QuantizationFlags, read_quantization_config
from .command import UsageError


def quantization_parser() -> ArgumentParser:
    """The flags, as a parent of a command's parser."""
    parser = HfArgumentParser([QuantizationFlags], add_help=False)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the codebooks.")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON file with all of these: what `plan --save` writes, or a compressed model's "
        "config.json.",
    )
    return parser


# Where there is no noise to read them, these flags too are of one scheme alone.
_WITHOUT_NOISE = {"ipq": ("block_size", "n_centroids"), "fixed_point": ("observer",)}


def quantization_config(args: Namespace) -> QuantizedModelConfig:
    """The config that the flags describe.

    Raises:
        UsageError: if a value is none of its flag's, a flag is of another scheme, or ``--config``
            has others beside it.
    """
    flags = QuantizationFlags(**{f.name: getattr(args, f.name) for f in fields(QuantizationFlags)})
    given = flags.given() + (["seed"] if args.seed else [])
    try:
        if args.config is None:
            flags.refuse_of_other_scheme(_WITHOUT_NOISE)
            return flags.config(args.seed)
        if given:
            raise ValueError(
                f"--config {args.config!r} has all settings; take --{given[0]} out, or change the "
                "file"
            )
        return read_quantization_config(args.config)
    except ValueError as error:
        raise UsageError(str(error)) from error


def allotted(model: PreTrainedModel, config: QuantizedModelConfig) -> QuantizedModelConfig:
    """The config with a target turned into ``layer_quantizers``, by quantization errors; one
    without a target, or allotted already, as it is.

    Raises:
        ValueError: if the target cannot be met.
    """
    if config.target is None or config.settings_by_name():
        return config
    allotment = plan_bit_allocation(model, config, progress=sys.stderr.isatty())
    return replace(config, layer_quantizers=allotment.layer_quantizers)
