"""The iPQ pass of section 3.2: quantize a stage, finetune what is above it, go on."""

from .arguments import CompressionArguments
from .budget import Allotment, allot, plan_budget
from .guards import GuardedTrainer
from .oneshot import quantize_model
from .pass_checks import check_pass
from .record import StageRecord
from .stages import StagedPass
from .target import check_plan, file_bytes

__all__ = [
    "Allotment",
    "CompressionArguments",
    "GuardedTrainer",
    "StageRecord",
    "StagedPass",
    "allot",
    "check_pass",
    "check_plan",
    "file_bytes",
    "plan_budget",
    "quantize_model",
]
