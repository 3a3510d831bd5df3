"""Quantization noise (section 4): quantizers applied to a random subset of the blocks."""

from .functions import NoiseFunction
from .injection import apply_quant_noise, noised_layers, remove_quant_noise
from .layers import is_noisy
from .state import QuantNoiseState, find_state

__all__ = [
    "NoiseFunction",
    "QuantNoiseState",
    "apply_quant_noise",
    "find_state",
    "is_noisy",
    "noised_layers",
    "remove_quant_noise",
]
