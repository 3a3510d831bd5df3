"""Terminal output of a trainer: one bar at a time, and nothing at ``log_level="error"``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # another one in notebooks
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

_VERBS = {"training_bar": "finetune", "prediction_bar": "evaluate"}


def is_quiet(args: TrainingArguments) -> bool:
    """Return whether the log level shows errors only."""
    return args.get_process_log_level() > logging.WARNING


def shows_progress(trainer: Trainer) -> bool:
    """Return whether this process shows progress bars."""
    args = trainer.args
    return trainer.is_world_process_zero() and not args.disable_tqdm and not is_quiet(args)


def silence_if_quiet(trainer: Trainer) -> None:
    """Remove the callbacks that print logs or bars if the log level shows errors only."""
    if is_quiet(trainer.args):
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)


@contextmanager
def no_file_bars() -> Iterator[None]:
    """Save and load checkpoints without bars, which would appear below that of the run."""
    enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bar()


@contextmanager
def not_printed(trainer: Trainer) -> Iterator[None]:
    """Log without printing what is shown as one line elsewhere."""
    handler = trainer.callback_handler
    callbacks = handler.callbacks
    handler.callbacks = [each for each in callbacks if not isinstance(each, PrinterCallback)]
    try:
        yield
    finally:
        handler.callbacks = callbacks


def name_bars(trainer: Trainer, stage: str) -> None:
    """Show what a trainer's bars are for, and remove them when they are finished."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            for kind, verb in _VERBS.items():
                bar = getattr(callback, kind)
                if bar is not None and not bar.desc:
                    bar.leave = False
                    bar.set_description(f"{verb} {stage}")
