"""The iPQ pass of section 3.2: quantize a stage, finetune what is above it, go on."""

from .arguments import CompressionArguments
from .budget import Allotment, allot, plan_budget
from .guards import GuardedTrainer
from .oneshot import quantize_model
from .stages import StageRecord, compress_in_stages
from .target import check_plan, file_bytes

__all__ = [
    "Allotment",
    "CompressionArguments",
    "GuardedTrainer",
    "StageRecord",
    "allot",
    "check_plan",
    "compress_in_stages",
    "file_bytes",
    "plan_budget",
    "quantize_model",
]
