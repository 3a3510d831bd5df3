"""Finds the checkpoint that an interrupted training resumes from: the newest complete one.

``Trainer`` (5.23) writes a checkpoint file by file into its final folder, ``trainer_state.json``
last, and resumes from the newest folder whatever is in it. A killed process leaves files out and
truncates the last one; a machine that stops may truncate any of them.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..distributed import broadcast_object, is_rank_0, raise_on_all_ranks

logger = logging.get_logger(__name__)

# Folder of a checkpoint -> the file that is missing from it or truncated; None if it is complete.
DefectFinder = Callable[[str], str | None]

_STATE = "trainer_state.json"
# Files that a resumed run reads. Others, such as those of users' callbacks, may be in any state.
_READ = re.compile(
    r".*\.safetensors|(quant_noise_)?config\.json|trainer_state\.json"
    r"|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth"
)
_WEIGHTS = re.compile(r"(adapter_)?model.*\.safetensors|pytorch_model.*\.bin")
# Written together, also by other names: optimizer.bin, rng_state_0.pth.
_TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def numbered_folders(folder: str, prefix: str) -> list[tuple[int, str]]:
    """Return (number, path) of the subfolders named prefix + number, sorted by number."""
    if not os.path.isdir(folder):
        return []
    matches = (re.fullmatch(rf"{prefix}(\d+)", name) for name in os.listdir(folder))
    return sorted((int(m[1]), os.path.join(folder, m[0])) for m in matches if m)


def is_complete(path: str) -> bool:
    """Return whether a JSON, safetensors or ``torch.save`` file exists and is not truncated."""
    try:
        if path.endswith(".json"):
            with open(path, encoding="utf-8") as file:
                json.load(file)
        elif path.endswith(".safetensors"):
            with safe_open(path, framework="pt"):
                pass
        else:
            with zipfile.ZipFile(path):
                pass
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False
    return True


def checkpoint_defect(folder: str, required: Sequence[str] = ()) -> str | None:
    """Return the file that is missing from a checkpoint of ``Trainer`` or truncated, if any.

    A checkpoint without optimizer, scheduler and random state (``save_only_model``) is complete.
    DeepSpeed and sharded FSDP keep their tensors in subfolders, which are not inspected.
    ``required`` names further files that must be there.
    """
    names = sorted(os.listdir(folder))
    for name in (_STATE, *required):
        if name not in names:
            return name
    for name in names:
        if _READ.fullmatch(name) and not is_complete(os.path.join(folder, name)):
            return name
    if not any(map(_WEIGHTS.fullmatch, names)):
        in_subfolders = any(os.path.isdir(os.path.join(folder, name)) for name in names)
        return None if in_subfolders else "model.safetensors"
    stems = {name.partition(".")[0].rstrip("_0123456789") for name in names}
    missing = [name for name in _TRAINING_STATE if name.partition(".")[0] not in stems]
    return missing[0] if missing and len(missing) < len(_TRAINING_STATE) else None


def newest_complete_checkpoint(
    folder: str, find_defect: DefectFinder
) -> tuple[str | None, dict[str, str]]:
    """Find the newest complete checkpoint in a folder: rank 0 decides, on all ranks.

    Returns:
        (its path or None, {path of a newer, incomplete checkpoint: its defect}).

    Raises:
        ValueError: on all ranks, if one of them does not see the checkpoint.
    """
    newest, defects = None, {}
    if is_rank_0():
        for _, path in reversed(numbered_folders(folder, f"{PREFIX_CHECKPOINT_DIR}-")):
            name, defect = os.path.basename(path), find_defect(path)
            if defect is None:
                newest = name
                break
            defects[name] = defect
    newest, defects = broadcast_object((newest, defects))
    defects = {os.path.join(folder, name): defect for name, defect in defects.items()}
    if newest is None:
        return None, defects
    checkpoint = os.path.join(folder, newest)
    with raise_on_all_ranks():
        if not os.path.isdir(checkpoint) or find_defect(checkpoint) is not None:
            raise folder_not_shared(checkpoint)
    return checkpoint, defects


def checkpoint_to_resume_from(output_dir: str, preferred: Sequence[str] = ()) -> str | None:
    """Return the newest complete checkpoint of a run on all ranks; None if there is none at all.

    Those that are skipped are reported in a warning. A checkpoint without the files ``preferred``
    is used only if no checkpoint has them.

    Raises:
        ValueError: if all checkpoints are incomplete, or one rank does not see the checkpoint.
    """
    defects: dict[str, str] = {}
    for required in dict.fromkeys((tuple(preferred), ())):
        find_defect = partial(checkpoint_defect, required=required)
        checkpoint, defects = newest_complete_checkpoint(output_dir, find_defect)
        if checkpoint is not None:
            if defects and is_rank_0():
                logger.warning(
                    f"skipped incomplete checkpoints: {_listed(defects)}; resuming from "
                    f"{checkpoint}"
                )
            return checkpoint
    if defects:
        raise ValueError(
            f"cannot resume: no checkpoint in {os.path.abspath(output_dir)} is complete: "
            f"{_listed(defects)}; call train() without resume_from_checkpoint, or pass the path of "
            "another checkpoint"
        )
    return None


def _listed(defects: dict[str, str]) -> str:
    return ", ".join(f"{path} ({name} is missing or truncated)" for path, name in defects.items())


def folder_not_shared(folder: str) -> ValueError:
    """Return the error of a rank that does not see what rank 0 resumes from."""
    return ValueError(
        f"cannot resume: a process does not see {os.path.abspath(folder)} as rank 0 does; set "
        "output_dir to a folder that all machines share"
    )
