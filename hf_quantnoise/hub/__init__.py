"""Integration with transformers: loading, saving and dequantizing quantized models."""

from .auto import (
    AutoQuantizedModel,
    AutoQuantizedModelForCausalLM,
    AutoQuantizedModelForImageClassification,
    AutoQuantizedModelForMaskedLM,
    AutoQuantizedModelForQuestionAnswering,
    AutoQuantizedModelForSeq2SeqLM,
    AutoQuantizedModelForSequenceClassification,
    AutoQuantizedModelForTokenClassification,
)
from .quantizer import QuantNoiseHfQuantizer

__all__ = [
    "AutoQuantizedModel",
    "AutoQuantizedModelForCausalLM",
    "AutoQuantizedModelForImageClassification",
    "AutoQuantizedModelForMaskedLM",
    "AutoQuantizedModelForQuestionAnswering",
    "AutoQuantizedModelForSeq2SeqLM",
    "AutoQuantizedModelForSequenceClassification",
    "AutoQuantizedModelForTokenClassification",
    "QuantNoiseHfQuantizer",
]
