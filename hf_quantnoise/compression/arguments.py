"""How the staged pass finetunes; what it produces is said by the quantization config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .distillation.features import parse_layers

# Options that earlier releases had -> why they were removed. A file or a flag that still names one
# is read with a warning that the option has no effect.
REMOVED_OPTIONS = {
    "reassign_steps": "reassigning blocks during finetuning gave no better models",
    "reassign_share": "reassigning blocks during finetuning gave no better models",
    "stage_schedule": "one schedule over all stages gave worse models than one for each stage",
    "distill_cache": "caching the teacher's logits did not make training faster",
    "distill_cache_mb": "caching the teacher's logits did not make training faster",
}


@dataclass(frozen=True)
class StageSettings:
    """How one stage is finetuned.

    Attributes:
        epochs: passes over the training data, where ``steps`` is None.
        steps: optimizer steps, or None.
        learning_rate, codebook_learning_rate: None takes the run's, and the stage's.
    """

    epochs: float
    steps: int | None
    learning_rate: float | None
    codebook_learning_rate: float | None

    @property
    def trains(self) -> bool:
        """Whether anything is finetuned at all."""
        return self.epochs > 0 if self.steps is None else self.steps > 0


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
    stage_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps of finetuning after each stage, instead of epochs."},
    )
    stage_settings: dict | str | None = field(
        default=None,
        metadata={
            "help": "JSON for stages that differ: {stage: {epochs, steps, learning_rate, "
            "codebook_learning_rate}}."
        },
    )
    keep_noise: bool = field(
        default=False,
        metadata={"help": "Keep the trainer's noise on layers whose stage is yet to come."},
    )
    calibration_batches: int = field(
        default=8,
        metadata={
            "help": "Training batches that set the scales of activations and the importance."
        },
    )
    budget_batches: int = field(
        default=1,
        metadata={
            "help": "Training batches to measure sensitivities on, for a target size; 0: none."
        },
    )
    plots: bool = field(
        default=True,
        metadata={"help": "Draw the finished pass: PNG files in output_dir/plots."},
    )
    distill: bool = field(
        default=True,
        metadata={"help": "Learn from a teacher, the uncompressed model (section 3.2)."},
    )
    distill_weight: float = field(
        default=1.0,
        metadata={"help": "Share of the teacher's logits in the loss; the labels have the rest."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both softmaxes of the logits."}
    )
    distill_hidden: float = field(
        default=0.0,
        metadata={"help": "Weight of the relative error of hidden states, added to the loss."},
    )
    distill_attention: float = field(
        default=0.0,
        metadata={"help": "Weight of the divergence of attention maps, added to the loss."},
    )
    distill_layers: str = field(
        default="all",
        metadata={
            "help": "Layers whose hidden states and attention maps are compared: 'all', 'last', or "
            "places counted from 0, as in 0,3,5."
        },
    )
    teacher_device: str | None = field(
        default=None,
        metadata={"help": "Where the teacher is, e.g. 'cpu'; default: beside the model."},
    )

    def __post_init__(self) -> None:
        for name in ("stage_learning_rate", "codebook_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0, or None")
        if self.stage_steps is not None and not self.stage_steps >= 0:
            raise ValueError(f"stage_steps={self.stage_steps!r} must be 0 or more, or None")
        self.stage_settings = _read_settings(self.stage_settings)
        if not self.stage_epochs >= 0:
            raise ValueError(f"stage_epochs={self.stage_epochs!r} must be 0 or more")
        if not self.calibration_batches >= 1:
            raise ValueError(f"calibration_batches={self.calibration_batches!r} must be 1 or more")
        if not self.budget_batches >= 0:
            raise ValueError(f"budget_batches={self.budget_batches!r} must be 0 or more")
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"distill_weight={self.distill_weight!r} must be from 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")
        self._check_teacher()

    def _check_teacher(self) -> None:
        for name in ("distill_hidden", "distill_attention"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 or more")
        inner = self.distill_hidden > 0 or self.distill_attention > 0
        if inner and not self.distill:
            raise ValueError(
                "distill_hidden and distill_attention need a teacher, and distill=False leaves it "
                "out; set distill=True (distill_weight=0 for no term of the logits)"
            )
        if self.distill_layers not in ("all", "last"):
            parse_layers(self.distill_layers)
        if self.teacher_device is not None:
            try:
                torch.device(self.teacher_device)
            except (RuntimeError, TypeError):
                raise ValueError(
                    f"teacher_device={self.teacher_device!r} must be a device, e.g. 'cpu' or "
                    "'cuda:1', or None"
                ) from None

    def of_stage(self, stage: str | None) -> StageSettings:
        """What holds for one stage: its own settings, and the common ones for the rest."""
        own = (self.stage_settings or {}).get("all" if stage is None else stage, {})
        epochs, steps = self.stage_epochs, self.stage_steps
        if own.keys() & {"epochs", "steps"}:  # one of them overrules both common ones
            epochs, steps = own.get("epochs", 0.0), own.get("steps")
        return StageSettings(
            epochs=epochs,
            steps=steps,
            learning_rate=own.get("learning_rate", self.stage_learning_rate),
            codebook_learning_rate=own.get("codebook_learning_rate", self.codebook_learning_rate),
        )

    def trains(self, stages: Iterable[str | None]) -> bool:
        """Whether any stage is finetuned."""
        return any(self.of_stage(stage).trains for stage in stages)

    def check_stages(self, stages: Iterable[str | None]) -> None:
        """Compares ``stage_settings`` with the stages of a config.

        Raises:
            ValueError: naming a stage that the config does not have.
        """
        known = ["all" if stage is None else stage for stage in stages]
        for stage in self.stage_settings or {}:
            if stage not in known:
                raise ValueError(
                    f"stage_settings names the stage {stage!r}; the config's stages are {known}"
                )


_KEYS = ("epochs", "steps", "learning_rate", "codebook_learning_rate")


def _read_settings(value: Any) -> dict[str, dict[str, float]] | None:
    """``stage_settings`` from JSON or a dict, checked."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = repr(value)
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(
        isinstance(own, Mapping) for own in value.values()
    ):
        raise ValueError(
            f"stage_settings={value!r} must be a dict, or JSON, from stage to its settings, e.g. "
            '{"attention": {"epochs": 2, "learning_rate": 1e-5}}'
        )
    for stage, own in value.items():
        for key, number in own.items():
            if key not in _KEYS:
                raise ValueError(
                    f"stage_settings: {key!r} (of stage {stage!r}) is unknown; known: "
                    f"{', '.join(_KEYS)}"
                )
            rate = "rate" in key
            if not isinstance(number, int | float) or number < 0 or (rate and number == 0):
                raise ValueError(
                    f"stage_settings: {key}={number!r} (of stage {stage!r}) must be "
                    f"{'above 0' if rate else '0 or more'}"
                )
    return {stage: dict(own) for stage, own in value.items()}
