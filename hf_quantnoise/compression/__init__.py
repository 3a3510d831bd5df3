"""Compression of a model in stages (iPQ, section 3.2), or in one shot."""

from typing import TYPE_CHECKING

from ..deferred_imports import lazy_exports

if TYPE_CHECKING:
    from .arguments import CompressionArguments
    from .bit_allocation.allocate import BitAllocation, allocate_bits, plan_bit_allocation
    from .bit_allocation.size_target import check_plan, file_bytes, smallest_bytes
    from .exact_checkpoints import ExactCheckpoints
    from .oneshot import quantize_model
    from .preflight import check_compression
    from .reporting.record import StageRecord
    from .stages import CompressionPipeline
    from .training.packed_trainer import PackedModelTrainer
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "arguments": ["CompressionArguments"],
            "bit_allocation.allocate": ["BitAllocation", "allocate_bits", "plan_bit_allocation"],
            "bit_allocation.size_target": ["check_plan", "file_bytes", "smallest_bytes"],
            "exact_checkpoints": ["ExactCheckpoints"],
            "oneshot": ["quantize_model"],
            "preflight": ["check_compression"],
            "reporting.record": ["StageRecord"],
            "stages": ["CompressionPipeline"],
            "training.packed_trainer": ["PackedModelTrainer"],
        },
    )

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
    "smallest_bytes",
]
