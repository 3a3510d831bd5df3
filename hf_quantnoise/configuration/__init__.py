"""The configs: what noise to train with, and how a compressed model is stored.

All are plain dataclasses with strict validation and a JSON form.
"""

from .layer_quantizers import DENSE, LAYER_KEYS
from .noise import NOISE_CONFIG_NAME, NOISES, QuantNoiseConfig
from .storage import (
    FORMAT_VERSION,
    OBSERVERS,
    QUANT_METHOD,
    SCHEMES,
    FixedPointConfig,
    IPQConfig,
    QuantizedModelConfig,
)

__all__ = [
    "DENSE",
    "FORMAT_VERSION",
    "LAYER_KEYS",
    "NOISES",
    "NOISE_CONFIG_NAME",
    "OBSERVERS",
    "QUANT_METHOD",
    "SCHEMES",
    "FixedPointConfig",
    "IPQConfig",
    "QuantNoiseConfig",
    "QuantizedModelConfig",
]
