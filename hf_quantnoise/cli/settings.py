"""The config of the compressed model, from the flags of ``plan`` and ``compress``."""

from __future__ import annotations

from argparse import Namespace

from ..argument_parsing import usage_errors
from ..configuration import QuantizedModelConfig
from ..configuration.flags import QuantizationFlags, read_quantization_config
from ..configuration.options import options_of


def quantization_config(args: Namespace) -> QuantizedModelConfig:
    """Return the config that the flags describe."""
    values = {name: getattr(args, name) for name in options_of(QuantizationFlags)}
    flags = QuantizationFlags(**values)
    given = flags.given() + (["seed"] if args.seed else [])
    with usage_errors():
        if args.config is None:
            return flags.config(args.seed, with_noise=False)
        if given:
            raise ValueError(
                f"--{given[0]} cannot be combined with --config {args.config!r}, which has all "
                "settings; remove the flag, or edit the file"
            )
        return read_quantization_config(args.config)
