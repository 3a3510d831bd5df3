"""Storage formats of a weight: encode and decode. Noise applies the same to a random subset."""

from .additive import AdditiveQuantizer
from .base import QUANTIZERS, Quantizer, quantizer_from_dict
from .fixed_point import FixedPointQuantizer
from .kmeans import assign, kmeans
from .packing import pack_codes, unpack_codes
from .product import ProductQuantizer

__all__ = [
    "QUANTIZERS",
    "AdditiveQuantizer",
    "FixedPointQuantizer",
    "ProductQuantizer",
    "Quantizer",
    "assign",
    "kmeans",
    "pack_codes",
    "quantizer_from_dict",
    "unpack_codes",
]
