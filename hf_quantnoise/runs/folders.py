"""Folders of a run in ``--output_dir``, and what a new run removes from them."""

from __future__ import annotations

import os

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..compression.checkpoints import FOLDER, StageCheckpoints
from ..files.durable import contains, remove_entries
from .arguments import Arguments
from .known_flags import refuse

DENSE, NOISE, COMPRESSED = "dense", "noise", "compressed"
ALLOCATION = "allocation.json"  # in NOISE, so that a resumed run has the same

# Flag with a model -> folders that the run changes before it has read the model for the last time,
# or removes files from.
_CHANGED = {
    "model_name_or_path": (FOLDER, NOISE),
    "teacher_name_or_path": (FOLDER, NOISE, DENSE),
}


def check_folders(args: Arguments) -> None:
    """Raise a ``ValueError`` for a missing checkpoint, and a model that the run would replace."""
    checkpoint = args.training.resume_from_checkpoint
    if isinstance(checkpoint, str) and not os.path.isdir(checkpoint):
        raise ValueError(
            f"invalid --resume_from_checkpoint {checkpoint!r}: no such folder; pass a checkpoint "
            "of the finetuning, such as OUTPUT_DIR/checkpoint-500"
        )
    models = {
        "model_name_or_path": args.model.model_name_or_path,
        "teacher_name_or_path": args.flags.teacher_name_or_path,
    }
    for flag, path in models.items():
        for name in _CHANGED[flag] if path is not None and os.path.isdir(path) else ():
            folder = os.path.join(str(args.training.output_dir), name)
            if contains(folder, path):
                raise refuse(
                    flag, path, f"is in {folder}, which the run replaces; pass another --output_dir"
                )


def forget_earlier_run(training: TrainingArguments) -> None:
    """Remove checkpoints that another run left in the folder; the user's files are kept.

    Called before ``results.json`` has a dense model, with which this run could be resumed.
    """
    folder = str(training.output_dir)
    StageCheckpoints(os.path.join(folder, FOLDER), training.should_save).clear()
    if training.should_save:
        own = rf"{PREFIX_CHECKPOINT_DIR}-\d+|{ALLOCATION}"
        remove_entries(os.path.join(folder, NOISE), own)
