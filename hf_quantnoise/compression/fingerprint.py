"""What a pass is asked for, as it is kept beside its stages: one with other settings does not go on
from them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import Trainer

from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from .arguments import CompressionArguments

Fingerprint = dict[str, dict[str, Any]]

_CHANGE_NO_MODEL = ("plots", "teacher_device")
# Lengths are the stages' own. What only rounds otherwise (torch_compile, tf32, recomputation) is a
# matter of the machine, and so is the number of processes.
_TRAINING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha",
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
    """All settings that the model at the end depends on, in parts, as JSON has them.

    Args:
        trainer: the run's; its arguments count, and what its stages take over.
        config, args: of the pass.
        noise: what is kept on waiting layers, or None.
        teacher: another model to learn from, or None.
    """
    arguments = asdict(args)
    for name in _CHANGE_NO_MODEL:
        del arguments[name]
    described = "a copy of the model"
    if teacher is not None:
        numbers = sum(parameter.numel() for parameter in teacher.parameters())
        described = f"a {type(teacher).__name__} of {numbers:,} numbers"
    asked = {
        "config": config.to_dict(),
        "compression_args": arguments,
        "qn_config": {} if noise is None else noise.to_dict(),
        "teacher": {"teacher": described},
        "TrainingArguments": _of_training(trainer),
        "parts of the trainer": {
            "optimizer_cls_and_kwargs": _plain(trainer.optimizer_cls_and_kwargs),
            "compute_loss_func": _plain(trainer.compute_loss_func),
        },
    }
    return json.loads(json.dumps(asked))


def require_same_settings(asked: Fingerprint, now: Fingerprint, folder: str) -> None:
    """Compares what was asked for with what is.

    Args:
        asked: kept by the pass that is gone on with; a part that it does not have is not compared.
        now: asked for.
        folder: where that pass is.

    Raises:
        ValueError: naming all fields of the first part that differs, with both values.
    """
    for part in asked:
        odd = [key for key in now[part] if asked[part].get(key) != now[part][key]]
        if odd:
            differences = ", and with ".join(
                f"{key}={asked[part].get(key)!r}, now it is {now[part][key]!r}" for key in odd
            )
            raise ValueError(
                f"resume_from_checkpoint: the pass in {folder} was begun with {differences}; take "
                f"the same {part}, or begin anew without resume_from_checkpoint"
            )


def _of_training(trainer: Trainer) -> dict[str, Any]:
    args = trainer.args
    given = args.to_dict()
    settings = {name: _plain(given[name]) for name in _TRAINING if name in given}
    settings[_BATCH] = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    settings[_PRECISION] = str(trainer.accelerator.mixed_precision)
    return settings


def _plain(value: Any) -> Any:
    """As JSON has it; what JSON has not, a class or a function, by its name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inside) for inside in value]
    return getattr(value, "__qualname__", type(value).__qualname__)
