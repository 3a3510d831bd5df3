"""How a weight is stored. A quantizer encodes and decodes; noise is the same on a random subset."""

from .additive import AdditiveQuantizer
from .base import QUANTIZERS, Quantizer, quantizer_from_dict
from .fixed_point import FixedPointQuantizer
from .kmeans import KMeansResult, assign, kmeans
from .packing import pack_codes, unpack_codes
from .product import ProductQuantizer

__all__ = [
    "QUANTIZERS",
    "AdditiveQuantizer",
    "FixedPointQuantizer",
    "KMeansResult",
    "ProductQuantizer",
    "Quantizer",
    "assign",
    "kmeans",
    "pack_codes",
    "quantizer_from_dict",
    "unpack_codes",
]
