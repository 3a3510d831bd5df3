"""How the staged pass finetunes; what it produces is said by the quantization config."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..validation import check_int


@dataclass
class CompressionArguments:
    """Finetuning between the stages of ``QuantNoiseTrainer.compress``.

    Made for ``HfArgumentParser``, beside ``TrainingArguments``; what it does not name (batch size,
    optimizer, precision, seed) is taken from the trainer's own arguments.

    Raises:
        ValueError: naming the field, the value given and what would do.
    """

    stage_epochs: float = field(
        default=1.0,
        metadata={"help": "Epochs of finetuning after each stage; 0 quantizes without any."},
    )
    stage_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the dense parameters; default: that of the run."},
    )
    codebook_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the centroids; default: stage_learning_rate."},
    )
    calibration_batches: int = field(
        default=8,
        metadata={
            "help": "Training batches that set the scales of activations and the importance."
        },
    )
    reassign_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps after which blocks may change codewords; None: never."},
    )
    reassign_share: float = field(
        default=0.01, metadata={"help": "Most blocks of a weight that do so each time, a share."}
    )
    distill: bool = field(
        default=True,
        metadata={"help": "Learn from the uncompressed model's logits (section 3.2)."},
    )
    distill_weight: float = field(
        default=1.0,
        metadata={"help": "Share of the teacher's term in the loss; the labels have the rest."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both softmaxes in the teacher's term."}
    )

    def __post_init__(self) -> None:
        for name in ("stage_learning_rate", "codebook_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0, or None")
        if not self.stage_epochs >= 0:
            raise ValueError(f"stage_epochs={self.stage_epochs!r} must be 0 or more")
        if not self.calibration_batches >= 1:
            raise ValueError(f"calibration_batches={self.calibration_batches!r} must be 1 or more")
        if self.reassign_steps is not None:
            check_int("reassign_steps", self.reassign_steps, 1, 2**31)
        if not 0 < self.reassign_share <= 1:
            raise ValueError(
                f"reassign_share={self.reassign_share!r} must be above 0 and at most 1"
            )
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"distill_weight={self.distill_weight!r} must be from 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")
