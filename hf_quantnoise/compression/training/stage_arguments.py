"""Training arguments and optimizer of a stage, derived from those of the user's trainer."""

from __future__ import annotations

import copy
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from ..arguments import StageSettings


def stage_training_arguments(
    trainer: Trainer, settings: StageSettings, number: int, output_dir: str | None
) -> TrainingArguments:
    """Return a trainer's arguments with the length, learning rate and seed of a stage.

    Checkpoints go to ``output_dir``; None keeps that of the trainer, which writes none.
    """
    args = trainer.args
    steps = -1 if settings.steps is None else settings.steps
    if steps <= 0 and not has_length(trainer.train_dataset):
        steps = 1  # nothing is trained, but Trainer requires max_steps for streamed data
    changes = {
        "num_train_epochs": settings.epochs,
        "max_steps": steps,
        "warmup_steps": 0,
        "eval_strategy": IntervalStrategy.NO,
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": [],  # the user's trainer shows what is logged
        "seed": args.seed + number,
    }
    if settings.learning_rate is not None:
        changes["learning_rate"] = settings.learning_rate
    if output_dir is not None:
        changes["output_dir"] = output_dir
        changes["save_only_model"] = False
        # Two, as the newest one may be incomplete when the run is killed.
        changes["save_total_limit"] = max(2, args.save_total_limit or 2)
        if args.save_strategy == SaveStrategy.BEST:
            changes["save_strategy"] = SaveStrategy.EPOCH
    # Not dataclasses.replace: it would run __post_init__ again, in which subclasses derive fields
    # from others and DeepSpeed is set up.
    changed = copy.copy(args)
    vars(changed).update(changes)
    return changed


def stage_optimizer(
    trainer: Trainer, settings: StageSettings
) -> tuple[type, dict[str, Any]] | None:
    """Return a trainer's ``optimizer_cls_and_kwargs`` with the learning rate of the stage."""
    if trainer.optimizer_cls_and_kwargs is None:
        return None
    optimizer_class, kwargs = trainer.optimizer_cls_and_kwargs
    rate = settings.learning_rate
    return optimizer_class, {**kwargs, **({} if rate is None else {"lr": rate})}
