"""Arguments of a compression run: how the model is finetuned between the stages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from ..configuration.checks import boolean, fraction, integer, invalid, non_negative, positive
from ..configuration.options import Options, documented, option
from ..registry import suggestion
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
    """Settings of one stage: the fields of its name in :class:`CompressionArguments`.

    It is finetuned for ``steps``, or for ``epochs`` if ``steps`` is None.
    """

    epochs: float
    steps: int | None
    learning_rate: float | None
    codebook_learning_rate: float | None

    @property
    def trains(self) -> bool:
        """Whether the stage is finetuned."""
        return self.epochs > 0 if self.steps is None else self.steps > 0


# Setting of a single stage -> its check.
_STAGE_CHECKS = {
    "epochs": non_negative,
    "steps": integer(0),
    "learning_rate": positive,
    "codebook_learning_rate": positive,
}


def _device(name: str, value: Any) -> None:
    try:
        torch.device(value)
    except (RuntimeError, TypeError):
        raise invalid(name, value, "a device, e.g. 'cpu' or 'cuda:1', or None") from None


def _layers(name: str, value: Any) -> None:
    if value not in ("all", "last"):
        parse_layers(value)


@documented
@dataclass
class CompressionArguments(Options):
    """Settings of finetuning and distillation in ``QuantNoiseTrainer.compress``.

    ``HfArgumentParser`` can parse them, next to ``TrainingArguments``. Batch size, optimizer,
    precision and seed are those of the trainer.

    Raises:
        ValueError: if a value is invalid; names the field, the value and what was expected.
    """

    stage_epochs: Annotated[float, non_negative] = option(
        1.0, "Epochs of finetuning after each stage; 0 quantizes without finetuning."
    )
    stage_learning_rate: Annotated[float | None, positive] = option(
        None,
        "Learning rate of the stages, each with the trainer's schedule from its start, without "
        "warmup. None: that of the trainer.",
    )
    codebook_learning_rate: Annotated[float | None, positive] = option(
        None, "Learning rate of the centroids. None: that of the stage."
    )
    stage_steps: Annotated[int | None, integer(0)] = option(
        None, "Optimizer steps of finetuning after each stage, instead of epochs."
    )
    stage_settings: dict | str | None = option(
        None,
        "Settings of single stages, a dict or JSON: {'attention': {'epochs': 2, 'learning_rate': "
        "1e-5}}, with epochs, steps, learning_rate or codebook_learning_rate.",
    )
    keep_noise: Annotated[bool, boolean] = option(
        False,
        "Keep the trainer's noise, at its full rate and without LayerDrop, on the layers of later "
        "stages.",
    )
    calibration_batches: Annotated[int, integer(1)] = option(
        8, "Training batches that set the scales of activation_bits and the importance of inputs."
    )
    batch_norm_batches: Annotated[int, integer(0)] = option(
        16,
        "Training batches per process on which the statistics of BatchNorm are measured for the "
        "packed weights: in each stage when it is packed, and again after finetuning. 0: keep "
        "those of the training.",
    )
    lookup_batches: Annotated[int, integer(1)] = option(
        2000, "Maximum number of training batches whose tokens are counted for frequent_rows."
    )
    budget_batches: Annotated[int, integer(0)] = option(
        1,
        "Training batches for measuring sensitivities, if the config has a target size; 0 uses "
        "quantization errors instead.",
    )
    plots: Annotated[bool, boolean] = option(
        True,
        "Plot the compression run as PNG files in output_dir/plots, if matplotlib is installed: "
        "metrics against MB per stage, error and bytes per layer.",
    )
    distill: Annotated[bool, boolean] = option(
        True, "Distill from a teacher in the stages (section 3.2)."
    )
    distill_weight: Annotated[float, fraction] = option(
        1.0, "Weight of the loss on the teacher's logits; that on the labels has the rest."
    )
    temperature: Annotated[float, positive] = option(
        1.0, "Temperature of the softmaxes of the teacher's and the model's logits."
    )
    distill_hidden: Annotated[float, non_negative] = option(
        0.0, "Weight of the relative squared error of the hidden states, added to the loss."
    )
    distill_attention: Annotated[float, non_negative] = option(
        0.0,
        "Weight of the KL divergence of the attention maps, added to the loss. Attention is then "
        "computed with the 'eager' implementation.",
    )
    distill_layers: Annotated[str, _layers] = option(
        "all",
        "Layers whose hidden states and attention maps are compared: 'all', 'last', or indices "
        "from 0, as a list or as in 0,3,5.",
    )
    random_tokens: Annotated[float, fraction] = option(
        0.0,
        "Share of the examples in which a fifth of the tokens are replaced by random ones of the "
        "batch, for the model and its teacher alike. Requires distill_weight=1.",
    )
    teacher_device: Annotated[str | None, _device] = option(
        None, "Device of the teacher, e.g. 'cpu'. None: that of the model."
    )

    removed: ClassVar[Mapping[str, str]] = REMOVED_OPTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stage_settings = _read_settings(self.stage_settings)
        if not self.distill and (self.distill_hidden > 0 or self.distill_attention > 0):
            raise ValueError(
                f"invalid distill=False: distill_hidden={self.distill_hidden!r} and "
                f"distill_attention={self.distill_attention!r} need a teacher; set distill=True "
                "(and distill_weight=0 for no loss on the logits)"
            )
        if self.random_tokens > 0 and not (self.distill and self.distill_weight == 1):
            raise ValueError(
                f"invalid random_tokens={self.random_tokens!r}: labels may be wrong for changed "
                f"texts, expected distill=True and distill_weight=1, got distill={self.distill!r} "
                f"and distill_weight={self.distill_weight!r}; set them, or random_tokens=0"
            )

    def settings_of(self, stage: str | None) -> StageSettings:
        """Return the settings of a stage; None is the only stage of a fixed-point config."""
        settings: Any = self.stage_settings or {}
        own = settings.get("all" if stage is None else stage, {})
        common = StageSettings(
            self.stage_epochs,
            self.stage_steps,
            self.stage_learning_rate,
            self.codebook_learning_rate,
        )
        if own.keys() & {"epochs", "steps"}:  # either of them overrides both common ones
            common = replace(common, epochs=0.0, steps=None)
        return replace(common, **own)

    def trains(self, stages: Iterable[str | None]) -> bool:
        """Whether any stage is finetuned."""
        return any(self.settings_of(stage).trains for stage in stages)

    def check_stages(self, stages: Iterable[str | None]) -> None:
        """Raise a ``ValueError`` if ``stage_settings`` names a stage that a config lacks."""
        known = ["all" if stage is None else stage for stage in stages]
        for stage in self.stage_settings or {}:
            if stage not in known:
                raise ValueError(
                    f"invalid stage_settings: unknown stage {stage!r}; the config's stages are "
                    f"{known}"
                )


def _read_settings(value: Any) -> dict[str, dict[str, float]] | None:
    """Return ``stage_settings``, read from JSON if it is a string, as a checked dict."""
    if value is None:
        return None
    try:
        settings = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        settings = None
    if not isinstance(settings, Mapping) or not all(
        isinstance(own, Mapping) for own in settings.values()
    ):
        expected = 'a dict, or JSON, e.g. {"attention": {"epochs": 2, "learning_rate": 1e-5}}'
        raise invalid("stage_settings", value, expected)
    for stage, own in settings.items():
        place = f"stage_settings[{stage!r}]"
        for key, setting in own.items():
            if key not in _STAGE_CHECKS:
                known = ", ".join(_STAGE_CHECKS)
                hint = suggestion(key, _STAGE_CHECKS)
                raise ValueError(f"invalid {place}: unknown {key!r}, known: {known}{hint}")
            _STAGE_CHECKS[key](f"{place}: {key}", setting)
    return {stage: dict(own) for stage, own in settings.items()}
