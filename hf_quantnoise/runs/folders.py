"""Folders of a run in ``--output_dir``, and what a new run removes from them."""

from __future__ import annotations

import os
import re
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..compression.checkpoints import FOLDER, OWN, StageCheckpoints
from ..files.durable import PART, path_within, remove_entries
from .arguments import Arguments
from .known_flags import refuse

DENSE, NOISE, COMPRESSED = "dense", "noise", "compressed"
ALLOCATION = "allocation.json"  # in NOISE, so that a resumed run has the same

# What a run writes: folder -> names in it, as a regular expression. A new run removes those of the
# second training and the compression, and replaces the others. Files of the user are kept.
_CHECKPOINTS = rf"{PREFIX_CHECKPOINT_DIR}-\d+"
_REMOVED = {FOLDER: OWN, NOISE: rf"{_CHECKPOINTS}|{re.escape(ALLOCATION)}({re.escape(PART)})?"}
_REPLACED = {DENSE: ".*", ".": _CHECKPOINTS}


def check_folders(args: Arguments) -> None:
    """Raise a ``ValueError`` for a missing checkpoint, and for a model that is not kept.

    A teacher is read again after the finetuning.
    """
    checkpoint = args.training.resume_from_checkpoint
    if isinstance(checkpoint, str) and not os.path.isdir(checkpoint):
        raise ValueError(
            f"invalid --resume_from_checkpoint {checkpoint!r}: no such folder; pass a checkpoint "
            "of the finetuning, such as OUTPUT_DIR/checkpoint-500"
        )
    if args.flags.resume_compression:  # nothing is removed
        return
    _require_kept(args, "model_name_or_path", args.model.model_name_or_path, _REMOVED)
    _require_kept(args, "resume_from_checkpoint", checkpoint, _REMOVED)
    teacher = args.flags.teacher_name_or_path
    _require_kept(args, "teacher_name_or_path", teacher, {**_REMOVED, **_REPLACED})


def _require_kept(args: Arguments, flag: str, path: Any, changed: dict[str, str]) -> None:
    if not isinstance(path, str) or not os.path.isdir(path):
        return
    for name, pattern in changed.items():
        folder = os.path.join(str(args.training.output_dir), name)
        within = path_within(folder, path)
        if within is not None and re.fullmatch(pattern, within.partition("/")[0]):
            raise refuse(
                flag,
                path,
                "is a part of the run in --output_dir, which a new run replaces; pass another "
                "--output_dir, or --resume_compression to resume that run",
            )


def forget_earlier_run(training: TrainingArguments) -> None:
    """Remove checkpoints that another run left in the folder; the user's files are kept.

    Called before ``results.json`` has a dense model, with which this run could be resumed.
    """
    folder = str(training.output_dir)
    StageCheckpoints(os.path.join(folder, FOLDER), training.should_save).clear()
    if training.should_save:
        remove_entries(os.path.join(folder, NOISE), _REMOVED[NOISE])
