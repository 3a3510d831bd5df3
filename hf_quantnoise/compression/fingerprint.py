"""Settings fingerprint of a compression run, which must match to resume from its stages."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from .arguments import REMOVED_OPTIONS, CompressionArguments

logger = logging.get_logger(__name__)

# Part -> setting -> value, as in JSON.
Fingerprint = dict[str, dict[str, Any]]

_ARGUMENTS = "compression_args"
_WITHOUT_INFLUENCE = ("plots", "teacher_device")
# Values with which an option that was removed had no effect.
_OFF = (None, False, "restart", 1e-4)
# The stages have their own lengths, and no warmup. What only changes rounding (torch_compile, tf32,
# activation checkpointing) may differ between machines, and so may the number of processes.
_TRAINING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha",
    "average_tokens_across_devices", "seed", "data_seed", "train_sampling_strategy",
    "length_column_name", "dataloader_drop_last", "accelerator_config",
)  # fmt: skip
_BATCH = "per_device_train_batch_size * processes * gradient_accumulation_steps"
_PRECISION = "mixed precision (bf16, fp16)"


def settings_fingerprint(
    trainer: Trainer,
    config: QuantizedModelConfig,
    args: CompressionArguments,
    noise: QuantNoiseConfig | None,
    teacher: nn.Module | None,
) -> Fingerprint:
    """Return all settings that the resulting model depends on.

    ``noise`` is that on the layers of later stages; ``teacher`` another model to distill from.
    """
    arguments = {
        name: value for name, value in asdict(args).items() if name not in _WITHOUT_INFLUENCE
    }
    described = "a copy of the model"
    if teacher is not None:
        n_parameters = sum(parameter.numel() for parameter in teacher.parameters())
        described = f"a {type(teacher).__name__} of {n_parameters:,} parameters"
    fingerprint = {
        "config": config.to_dict(),
        _ARGUMENTS: arguments,
        "qn_config": {} if noise is None else noise.to_dict(),
        "teacher": {"teacher": described},
        "TrainingArguments": _training_settings(trainer),
        "parts of the trainer": {
            "optimizer_cls_and_kwargs": _as_json(trainer.optimizer_cls_and_kwargs),
            "compute_loss_func": _as_json(trainer.compute_loss_func),
        },
    }
    return json.loads(json.dumps(fingerprint))


def require_same_settings(stored: Fingerprint, current: Fingerprint, folder: str) -> None:
    """Compare the settings stored in the folder of an interrupted run with the current ones.

    Parts that were not stored are not compared. An option that the release of the run did not have
    may have its default. Removed options are reported in a warning.

    Raises:
        ValueError: naming all settings of the first part that differs, with both values.
    """
    for name, value in stored.get(_ARGUMENTS, {}).items():
        if name in REMOVED_OPTIONS and value not in _OFF:
            logger.warning(f"{name}={value!r} (in {folder}) has no effect: {REMOVED_OPTIONS[name]}")
    for part, settings in stored.items():
        if part == "teacher":  # earlier releases ended it with another word
            settings = {
                name: re.sub(r"(?<=\d )\w+$", "parameters", text) for name, text in settings.items()
            }
        defaults = asdict(CompressionArguments()) if part == _ARGUMENTS else {}
        changes = [
            f"{name}={settings.get(name)!r} (now {value!r})"
            for name, value in current.get(part, {}).items()
            if settings.get(name, defaults.get(name)) != value
        ]
        if changes:
            raise ValueError(
                f"cannot resume: the run in {folder} was started with {', '.join(changes)}; use "
                f"the same {part}, or start from scratch without resume_from_checkpoint"
            )


def _training_settings(trainer: Trainer) -> dict[str, Any]:
    args = trainer.args
    values = args.to_dict()
    settings = {name: _as_json(values[name]) for name in _TRAINING if name in values}
    settings[_BATCH] = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    settings[_PRECISION] = str(trainer.accelerator.mixed_precision)
    return settings


def _as_json(value: Any) -> Any:
    """Convert a value for JSON; classes, functions and other objects become their names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return getattr(value, "__qualname__", type(value).__qualname__)
