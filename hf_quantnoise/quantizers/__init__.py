"""Storage formats of a weight: encode and decode. Noise applies the same to a random subset."""

from ..configuration import quantizer_from_dict
from .additive import AdditiveQuantizer
from .base import Quantizer
from .fixed_point import FixedPointQuantizer
from .product import ProductQuantizer
from .row_groups import RowGroupQuantizer

__all__ = [
    "AdditiveQuantizer",
    "FixedPointQuantizer",
    "ProductQuantizer",
    "Quantizer",
    "RowGroupQuantizer",
    "quantizer_from_dict",
]
