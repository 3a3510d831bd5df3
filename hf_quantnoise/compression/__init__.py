"""Compression of a model in stages (iPQ, section 3.2), or in one shot."""

from .arguments import CompressionArguments
from .bit_allocation.allocate import BitAllocation, allocate_bits, plan_bit_allocation
from .bit_allocation.size_target import check_plan, file_bytes
from .exact_checkpoints import ExactCheckpoints
from .oneshot import quantize_model
from .preflight import check_compression
from .reporting.record import StageRecord
from .stages import CompressionPipeline
from .training.packed_trainer import PackedModelTrainer

__all__ = [
    "BitAllocation",
    "CompressionArguments",
    "CompressionPipeline",
    "ExactCheckpoints",
    "PackedModelTrainer",
    "StageRecord",
    "allocate_bits",
    "check_compression",
    "check_plan",
    "file_bytes",
    "plan_bit_allocation",
    "quantize_model",
]
