"""Logs and progress bars of a run."""

from __future__ import annotations

import logging
import sys

import datasets
import transformers
from transformers import TrainingArguments

from ..compression.reporting.console import is_quiet


def set_up_logging(training: TrainingArguments) -> None:
    """Log to stdout, at the level of ``--log_level``; above warnings without progress bars."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    level = training.get_process_log_level()
    logging.getLogger(__package__.partition(".")[0]).setLevel(level)
    datasets.utils.logging.set_verbosity(max(level, logging.WARNING))
    transformers.utils.logging.set_verbosity(level)
    if is_quiet(training):
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
