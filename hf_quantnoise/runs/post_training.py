"""``--noise_after_finetuning``: training with noise, distilled from the finetuned model."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, get_last_checkpoint

from ..trainer import QuantNoiseTrainer
from .arguments import Arguments

logger = logging.getLogger(__name__)


def train_with_noise(
    args: Arguments,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    folder: str,
    resume: bool,
    parts: dict[str, Any],
) -> tuple[QuantNoiseTrainer, dict[str, float]]:
    """Train a finetuned model with noise (section 5.3).

    Args:
        args: of the run.
        model: the finetuned model.
        teacher: None trains on the labels.
        folder: folder of the checkpoints; those of an earlier run are removed.
        resume: continue from the newest of these checkpoints, if there is one.
        parts: arguments of any Trainer: datasets, collator, metrics, processing class.

    Returns:
        The trainer, whose further output goes to the folder of the run; and the metrics.
    """
    if not resume:
        if args.training.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        args.training.distributed_state.wait_for_everyone()
    trainer = QuantNoiseTrainer(
        model,
        _training_arguments(args, folder),
        args.noise,
        teacher=teacher,
        compression_args=args.compression,
        **parts,
    )
    checkpoint = _has_checkpoint(folder) if resume else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.args.output_dir = args.training.output_dir
    return trainer, metrics


def _has_checkpoint(folder: str) -> bool | None:
    """Return True if there is a checkpoint to resume from, else None."""
    try:
        found = get_last_checkpoint(folder)
    except FileNotFoundError:
        found = None
    if found is None:
        logger.warning("nothing to resume in %s: starting from the finetuned model", folder)
        return None
    return True


def _training_arguments(args: Arguments, folder: str) -> TrainingArguments:
    """Return the arguments of the finetuning with another length, learning rate and folder."""
    training, flags = args.training, args.flags
    length = flags.noise_after_finetuning
    changes: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": length * training.num_train_epochs,
        # In evaluation the model is not quantized, so its metrics choose no checkpoint.
        "eval_strategy": IntervalStrategy.NO,
        "load_best_model_at_end": False,
    }
    if training.max_steps > 0:
        changes["max_steps"] = math.ceil(length * training.max_steps)
    if flags.noise_learning_rate is not None:
        changes["learning_rate"] = flags.noise_learning_rate
    if training.save_strategy == SaveStrategy.BEST:
        changes["save_strategy"] = SaveStrategy.EPOCH
    changed = copy.copy(training)  # see stage_training_arguments
    vars(changed).update(changes)
    return changed
