"""Configs of training noise and of compressed models: dataclasses with checks and a JSON form."""

from .entries import LAYER_KEYS, QUANTIZERS, check_settings, quantizer_from_dict, settings_of
from .fixed_point import FixedPointConfig
from .ipq import IPQConfig
from .layer_quantizers import DENSE
from .noise import NOISE_CONFIG_NAME, NOISES, QuantNoiseConfig
from .storage import FORMAT_VERSION, OBSERVERS, QUANT_METHOD, SCHEMES, QuantizedModelConfig

__all__ = [
    "DENSE",
    "FORMAT_VERSION",
    "LAYER_KEYS",
    "NOISES",
    "NOISE_CONFIG_NAME",
    "OBSERVERS",
    "QUANTIZERS",
    "QUANT_METHOD",
    "SCHEMES",
    "FixedPointConfig",
    "IPQConfig",
    "QuantNoiseConfig",
    "QuantizedModelConfig",
    "check_settings",
    "quantizer_from_dict",
    "settings_of",
]
