"""Integration with transformers: loading, saving and dequantizing quantized models."""

from .auto import AutoQuantizedModel
from .quantizer import QuantNoiseHfQuantizer

__all__ = ["AutoQuantizedModel", "QuantNoiseHfQuantizer"]
