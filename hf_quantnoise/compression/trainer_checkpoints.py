"""Which checkpoint a killed run goes on from: the newest whole one.

``Trainer`` (5.23) writes a checkpoint into its final folder, file by file, ``trainer_state.json``
last, and resumes from the newest folder whatever is in it. A killed process leaves files out and
the last one torn; a machine that stops may tear any of them.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..callback import STATE_NAME
from ..configuration import NOISE_CONFIG_NAME
from ..distributed import broadcast_object, is_rank_0, raise_on_all_ranks

logger = logging.get_logger(__name__)

# A checkpoint's folder -> the file by which it is not whole; None if it is.
DefectFinder = Callable[[str], str | None]

_STATE, _SCHEDULER = "trainer_state.json", "scheduler.pt"
# DeepSpeed's last file names the folder of the others; a folder of torch's distributed checkpoints
# (FSDP) is whole with its last file.
_DEEPSPEED, _DISTRIBUTED = "latest", ".metadata"


def numbered(folder: str, prefix: str) -> list[tuple[int, str]]:
    """The folders inside one whose names are a prefix and a number, by that number."""
    if not os.path.isdir(folder):
        return []
    matches = (re.fullmatch(rf"{prefix}(\d+)", name) for name in os.listdir(folder))
    return sorted((int(m[1]), os.path.join(folder, m[0])) for m in matches if m)


def is_whole(path: str) -> bool:
    """Whether a safetensors file is there with all the bytes that its header names."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _is_whole_archive(path: str) -> bool:
    """The same of what ``torch.save`` wrote: a zip file, whose table of contents comes last."""
    try:
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


def _is_whole_json(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return True


# What a resumed run reads, wherever in the folder. Whatever else lies there is nobody's concern.
_READ = (
    (rf"(adapter_)?model(-\d+-of-\d+)?\.safetensors|{re.escape(STATE_NAME)}", is_whole),
    (
        r"(adapter_model|pytorch_model.*)\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt"
        r"|rng_state(_\d+)?\.pth",
        _is_whole_archive,
    ),
    (
        rf"(adapter_)?config\.json|.+\.index\.json|{re.escape(NOISE_CONFIG_NAME)}",
        _is_whole_json,
    ),
)
_WEIGHTS = (
    r"((adapter_)?model\.safetensors|(adapter|pytorch)_model\.bin)(\.index\.json)?"
    r"|pytorch_model_fsdp.*"
)


def checkpoint_defect(folder: str) -> str | None:
    """The file by which a checkpoint of ``Trainer`` is not whole: missing, torn or not readable.

    One without optimizer, schedule and random numbers is whole too (``save_only_model``), and so
    are those of FSDP and DeepSpeed, which hold other files.

    Returns:
        Its path inside the folder; None if the checkpoint is whole.
    """
    if not _is_whole_json(os.path.join(folder, _STATE)):
        return _STATE
    for inside, folders, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(inside, name)
            if any(re.fullmatch(form, name) and not whole(path) for form, whole in _READ):
                return os.path.relpath(path, folder)
            if name.endswith(".index.json") and (shard := _missing_shard(path)):
                return os.path.relpath(os.path.join(inside, shard), folder)
        for name in folders:
            own = os.path.join(inside, name)
            if re.fullmatch(r"(pytorch_model_fsdp|optimizer)_\d+", name) and not os.path.isfile(
                os.path.join(own, _DISTRIBUTED)
            ):
                return os.path.relpath(os.path.join(own, _DISTRIBUTED), folder)
    return _missing_part(folder)


def _missing_shard(index: str) -> str | None:
    with open(index, encoding="utf-8") as file:
        shards = sorted(set(json.load(file).get("weight_map", {}).values()))
    inside = os.path.dirname(index)
    return next((name for name in shards if not os.path.isfile(os.path.join(inside, name))), None)


def _missing_part(folder: str) -> str | None:
    """The part that a checkpoint lacks: weights, or one of those that are written together."""
    names = os.listdir(folder)
    deepspeed = _DEEPSPEED in names
    if deepspeed:
        with open(os.path.join(folder, _DEEPSPEED), encoding="utf-8") as file:
            tag = file.read().strip()
        if not tag or not os.path.isdir(os.path.join(folder, tag)):
            return _DEEPSPEED
    adapters = (
        os.path.join(folder, name, f"adapter_model{end}")
        for name in names
        for end in (".safetensors", ".bin")
    )
    if not (
        deepspeed
        or any(re.fullmatch(_WEIGHTS, name) for name in names)
        or any(os.path.isfile(path) for path in adapters)
    ):
        return "model.safetensors"
    there = {
        "optimizer.pt": any("optimizer" in name for name in names),
        _SCHEDULER: _SCHEDULER in names,
        "rng_state.pth": any(name.startswith("rng_state") for name in names),
    }
    if not any(there.values()):
        return None
    if deepspeed:
        there["optimizer.pt"] = there[_SCHEDULER] = True  # its own files may hold both
    return next((name for name, found in there.items() if not found), None)


def newest_complete_checkpoint(
    folder: str, flaw_of: DefectFinder
) -> tuple[str | None, dict[str, str]]:
    """The newest whole checkpoint in a folder, as rank 0 finds it; on all ranks.

    Returns:
        (its path, or None; the paths of the torn ones that are newer -> their flaws).

    Raises:
        ValueError: on all ranks, where one does not find it.
    """
    name, torn = broadcast_object(_own_newest(folder, flaw_of) if is_rank_0() else None)
    torn = {os.path.join(folder, each): flaw for each, flaw in torn.items()}
    if name is None:
        return None, torn
    checkpoint = os.path.join(folder, name)
    with raise_on_all_ranks():
        if flaw_of(checkpoint) is not None:
            raise not_shared(checkpoint)
    return checkpoint, torn


def _own_newest(folder: str, flaw_of: DefectFinder) -> tuple[str | None, dict[str, str]]:
    torn: dict[str, str] = {}
    for _, checkpoint in reversed(numbered(folder, f"{PREFIX_CHECKPOINT_DIR}-")):
        name, flaw = os.path.basename(checkpoint), flaw_of(checkpoint)
        if flaw is None:
            return name, torn
        torn[name] = flaw
    return None, torn


def checkpoint_to_resume_from(output_dir: str, *rules: DefectFinder) -> str | None:
    """The newest whole checkpoint of a run, by the first of some rules that any is whole by; those
    passed over are named in a warning. On all ranks.

    Returns:
        Its path; None where there is no checkpoint.

    Raises:
        ValueError: if there are checkpoints and all are torn, or one rank does not find the
            others'.
    """
    torn: dict[str, str] = {}
    for flaw_of in rules:
        checkpoint, torn = newest_complete_checkpoint(output_dir, flaw_of)
        if checkpoint is not None:
            if torn and is_rank_0():
                logger.warning(f"{_in_words(torn)}; training goes on from {checkpoint}")
            return checkpoint
    if torn:
        raise ValueError(
            f"resume_from_checkpoint=True: no checkpoint in {os.path.abspath(output_dir)} is "
            f"whole: {_in_words(torn)}; train from the beginning, without resume_from_checkpoint, "
            "or name the folder of another checkpoint"
        )
    return None


def _in_words(torn: dict[str, str]) -> str:
    return ", ".join(
        f"{path} is torn ({flaw} is missing or cannot be read)" for path, flaw in torn.items()
    )


def not_shared(folder: str) -> ValueError:
    """The error of a rank that does not find what rank 0 goes on from."""
    return ValueError(
        f"resume_from_checkpoint: a process of this run does not find in {os.path.abspath(folder)} "
        "what the first one goes on from; output_dir must be a folder that all machines share"
    )
