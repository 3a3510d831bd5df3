"""Registers the format of packed models with transformers, so that ``from_pretrained`` loads it.

It is registered as soon as ``transformers.quantizers`` is imported, which happens before any model
is loaded. The classes registered there create those of ``configuration/`` and ``hub/``, which are
imported when a packed model is loaded: at this point transformers itself is not yet complete.
"""

from __future__ import annotations

from typing import Any

from .deferred_imports import call_after_import
from .version import QUANT_METHOD


def register_with_transformers() -> None:
    """Register the format, now or when ``transformers.quantizers`` is imported."""
    call_after_import("transformers.quantizers", _register)


def _register(quantizers: Any) -> None:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @quantizers.register_quantization_config(QUANT_METHOD)
    class DeferredConfig(QuantizationConfigMixin):
        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            from .configuration import QuantizedModelConfig

            return QuantizedModelConfig.from_dict(*args, **kwargs)

    @quantizers.register_quantizer(QUANT_METHOD)
    class DeferredQuantizer(quantizers.HfQuantizer):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            from .hub.quantizer import QuantNoiseHfQuantizer

            return QuantNoiseHfQuantizer(*args, **kwargs)
