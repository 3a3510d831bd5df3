"""Training with quantization noise and iterative product quantization for Transformers models.

The method is "Training with Quantization Noise for Extreme Model Compression" (Fan, Stock et al.,
2020). Importing the package registers its format with transformers, so that ``from_pretrained``
loads compressed models. Everything else is imported when it is used.
"""

from typing import TYPE_CHECKING

from .deferred_imports import lazy_exports
from .registration import register_with_transformers
from .version import __version__

if TYPE_CHECKING:
    from .batch_norm import update_bn_stats
    from .callback import QuantNoiseCallback
    from .compression import (
        CompressionArguments,
        ExactCheckpoints,
        allocate_bits,
        quantize_model,
    )
    from .compression.bit_allocation.allocate import allot as allot
    from .configuration import FixedPointConfig, IPQConfig, QuantNoiseConfig
    from .export import export_aqlm, export_onnx
    from .hub.auto import (
        AutoQuantizedModel,
        AutoQuantizedModelForCausalLM,
        AutoQuantizedModelForImageClassification,
        AutoQuantizedModelForMaskedLM,
        AutoQuantizedModelForQuestionAnswering,
        AutoQuantizedModelForSeq2SeqLM,
        AutoQuantizedModelForSequenceClassification,
        AutoQuantizedModelForTokenClassification,
    )
    from .lookups import count_lookups
    from .modeling.inference import optimize_for_inference, restore_packed
    from .noise import apply_quant_noise, remove_quant_noise
    from .publishing import QuantNoiseCard, push_to_hub, write_model_card
    from .recipes import Recipe, recipe
    from .size import size_report
    from .trainer import QuantNoiseTrainer
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "batch_norm": ["update_bn_stats"],
            "callback": ["QuantNoiseCallback"],
            "compression": [
                "CompressionArguments",
                "ExactCheckpoints",
                "allocate_bits",
                "quantize_model",
            ],
            "configuration": ["FixedPointConfig", "IPQConfig", "QuantNoiseConfig"],
            "export": ["export_aqlm", "export_onnx"],
            "hub.auto": [
                "AutoQuantizedModel",
                "AutoQuantizedModelForCausalLM",
                "AutoQuantizedModelForImageClassification",
                "AutoQuantizedModelForMaskedLM",
                "AutoQuantizedModelForQuestionAnswering",
                "AutoQuantizedModelForSeq2SeqLM",
                "AutoQuantizedModelForSequenceClassification",
                "AutoQuantizedModelForTokenClassification",
            ],
            "lookups": ["count_lookups"],
            "modeling.inference": ["optimize_for_inference", "restore_packed"],
            "noise": ["apply_quant_noise", "remove_quant_noise"],
            "publishing": ["QuantNoiseCard", "push_to_hub", "write_model_card"],
            "recipes": ["Recipe", "recipe"],
            "size": ["size_report"],
            "trainer": ["QuantNoiseTrainer"],
        },
        allot="compression.bit_allocation.allocate",
    )

__all__ = [
    "AutoQuantizedModel",
    "AutoQuantizedModelForCausalLM",
    "AutoQuantizedModelForImageClassification",
    "AutoQuantizedModelForMaskedLM",
    "AutoQuantizedModelForQuestionAnswering",
    "AutoQuantizedModelForSeq2SeqLM",
    "AutoQuantizedModelForSequenceClassification",
    "AutoQuantizedModelForTokenClassification",
    "CompressionArguments",
    "ExactCheckpoints",
    "FixedPointConfig",
    "IPQConfig",
    "QuantNoiseCallback",
    "QuantNoiseCard",
    "QuantNoiseConfig",
    "QuantNoiseTrainer",
    "Recipe",
    "__version__",
    "allocate_bits",
    "apply_quant_noise",
    "count_lookups",
    "export_aqlm",
    "export_onnx",
    "optimize_for_inference",
    "push_to_hub",
    "quantize_model",
    "recipe",
    "remove_quant_noise",
    "restore_packed",
    "size_report",
    "update_bn_stats",
    "write_model_card",
]

register_with_transformers()
