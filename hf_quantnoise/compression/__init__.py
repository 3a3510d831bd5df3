"""The iPQ pass of section 3.2: quantize a stage, finetune what is above it, go on."""

from .arguments import CompressionArguments
from .guards import GuardedTrainer
from .oneshot import quantize_model
from .stages import StageRecord, compress_in_stages

__all__ = [
    "CompressionArguments",
    "GuardedTrainer",
    "StageRecord",
    "compress_in_stages",
    "quantize_model",
]
