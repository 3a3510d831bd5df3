"""Where the package meets Transformers: loading, saving, publishing."""

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
