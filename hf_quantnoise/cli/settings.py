"""Flags of the compressed model, for ``plan`` and ``compress``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields, replace

from transformers import HfArgumentParser, PreTrainedModel

from ..compression.bit_allocation.allocate import plan_bit_allocation
from ..configuration import IPQConfig, QuantizedModelConfig
from ..configuration.flags import QuantizationFlags, read_quantization_config
from ..configuration.options import options_of
from .command import UsageError


def quantization_parser() -> ArgumentParser:
    """Return the flags, as a parent of a command's parser."""
    parser = HfArgumentParser([QuantizationFlags], add_help=False)
    parser.add_argument("--seed", type=int, default=0, help=options_of(IPQConfig)["seed"].help)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON file with all of these settings: the output of `plan --save`, or the "
        "config.json of a compressed model.",
    )
    return parser


def quantization_config(args: Namespace) -> QuantizedModelConfig:
    """Return the config that the flags describe."""
    flags = QuantizationFlags(**{f.name: getattr(args, f.name) for f in fields(QuantizationFlags)})
    given = flags.given() + (["seed"] if args.seed else [])
    try:
        if args.config is None:
            flags.check_scheme(with_noise=False)
            return flags.config(args.seed)
        if given:
            raise ValueError(
                f"--{given[0]} cannot be combined with --config {args.config!r}, which has all "
                "settings; remove the flag, or edit the file"
            )
        return read_quantization_config(args.config)
    except ValueError as error:
        raise UsageError(str(error)) from error


def with_allocated_bits(
    model: PreTrainedModel, config: QuantizedModelConfig
) -> QuantizedModelConfig:
    """Return the config with ``layer_quantizers`` filled in, if it has a target size."""
    if not isinstance(config, IPQConfig) or config.target is None or config.layer_quantizers:
        return config
    allocation = plan_bit_allocation(model, config, progress=sys.stderr.isatty())
    return replace(config, layer_quantizers=allocation.layer_quantizers)
