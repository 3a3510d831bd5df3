"""Files of a compression run, from which it resumes after it was killed at any moment.

    <output_dir>/compression/stage-0/      the dense model, also the teacher of a resumed run
    <output_dir>/compression/stage-2/      the model after its second stage, as it was in memory
    <output_dir>/compression/run-3/        checkpoints of the third stage's finetuning

A stage's folder is written under a temporary name and renamed once it is complete. A checkpoint is
complete once its last file exists, the list of its files (``files/durable.py``). A stage or a
checkpoint with a file that is missing or not as listed is skipped with a warning for an older one;
if the dense model has such a file, resuming raises. Folders of earlier releases have no list; their
files are only checked for truncation. Tensors are stored as they are in memory (a file of the
compressed model has 16-bit centroids, but training continues with 32-bit ones), so that a resumed
run is equal bit for bit.

Rank 0 decides where a run resumes. All ranks read the files, so all machines must share the folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

from ..distributed import broadcast_object, is_rank_0, raise_on_all_ranks
from ..files.durable import (
    PART,
    entries,
    find_defect,
    flush,
    has_list,
    remove_entries,
    write_json,
    write_list,
)
from ..lookups import Lookups
from .exact_checkpoints import (
    MEMORY_NAME,
    in_memory_tensors,
    load_in_memory_tensors,
    save_tensors,
)
from .fitted_noise import FittedNoise, load_fitted_noise, save_fitted_noise
from .trainer_checkpoints import (
    checkpoint_defect,
    folder_not_shared,
    is_complete,
    newest_complete_checkpoint,
    numbered_folders,
)

logger = logging.get_logger(__name__)

FOLDER = "compression"
_STAGE, _RUN = "stage-", "run-"
OWN = rf"({_STAGE}|{_RUN})\d+({re.escape(PART)})?"  # the names in the folder
_CONTENT, _TENSORS, _LOOKUPS = "stage.json", "tensors.safetensors", "lookups.safetensors"
_KEYS = {"asked", "config", "history"}  # of the content


@dataclass(frozen=True)
class SavedStage:
    """A finished stage on disk; number 0 is the dense model.

    ``content`` holds the settings, the plan so far and the records, ``folder`` also the tensors.
    """

    number: int
    content: dict[str, Any]
    folder: str

    def load_into(self, model: nn.Module) -> None:
        """Copy the model's tensors into one of the same structure."""
        load_in_memory_tensors(model, load_file(os.path.join(self.folder, _TENSORS)))

    def lookups(self) -> Lookups:
        """Return the lookups that the run has counted; empty if it needs none."""
        path = os.path.join(self.folder, _LOOKUPS)
        return load_file(path) if os.path.isfile(path) else {}

    def fitted_noise(self, model: nn.Module) -> FittedNoise:
        """Return what the noise of the dense model was fitted to."""
        return load_fitted_noise(self.content.get("noise", {}), model, self.folder)


class StageCheckpoints:
    """Reads and writes the files of a compression run.

    Args:
        folder: ``<output_dir>/compression``; None writes nothing.
        writes: whether this process writes.
    """

    def __init__(self, folder: str | None, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes and folder is not None

    def stages(self) -> list[SavedStage]:
        """Return the complete stages in order, as rank 0 finds them, on all ranks.

        Empty without the dense model, which every later stage needs. All ranks raise a
        ``ValueError`` if a file of the dense model is damaged, or a rank finds other stages.
        """
        with raise_on_all_ranks():
            found = self._find_stages() if is_rank_0() else []
        found = broadcast_object(found)
        stages = [
            replace(stage, folder=os.path.join(self.folder, os.path.basename(stage.folder)))
            for stage in found
        ]
        with raise_on_all_ranks():
            for stage in stages:
                # Compared as text, since NaN is not equal to itself.
                if json.dumps(_read_content(stage.folder)) != json.dumps(stage.content):
                    raise folder_not_shared(stage.folder)
        return stages

    def _find_stages(self) -> list[SavedStage]:
        found = []
        for number, folder in numbered_folders(self.folder, _STAGE):
            defect = _stage_defect(folder)
            if defect is None:
                found.append(SavedStage(number, _read_content(folder), folder))
            elif number > 0:
                self._skip(folder, defect)
            else:
                raise ValueError(
                    f"cannot resume: {os.path.join(folder, defect)} is missing or damaged, and all "
                    "stages need the dense model; restore the file, or start from scratch without "
                    "resume_from_checkpoint"
                )
        return found if found and found[0].number == 0 else []

    def _skip(self, folder: str, defect: str) -> None:
        logger.warning(f"skipping {folder}: {defect} is missing or damaged")
        if self.writes:
            shutil.rmtree(folder, ignore_errors=True)

    def save_stage(
        self,
        number: int,
        model: nn.Module,
        content: dict[str, Any],
        fitted: FittedNoise | None = None,
        lookups: Lookups | None = None,
    ) -> None:
        """Write a finished stage; only the dense model (number 0) and the newest stage are kept.

        ``fitted`` is what the noise of the dense model was fitted to. It and ``lookups`` are
        written with the dense model.
        """
        if not self.writes:
            return
        folder = os.path.join(self.folder, f"{_STAGE}{number}")
        part = folder + PART
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        if number == 0:
            content = {**content, "noise": save_fitted_noise(fitted or {}, model, part)}
            if lookups:  # those of tied layers are one tensor, which safetensors refuses
                counts = {name: each.clone() for name, each in lookups.items()}
                save_tensors(counts, os.path.join(part, _LOOKUPS))
        write_json(content, os.path.join(part, _CONTENT))
        save_tensors(in_memory_tensors(model), os.path.join(part, _TENSORS))
        write_list(part)
        shutil.rmtree(folder, ignore_errors=True)  # incomplete on a machine other than rank 0's
        os.replace(part, folder)
        flush(self.folder)
        done = [old for n, old in numbered_folders(self.folder, _STAGE) if 0 < n < number]
        done += [old for n, old in numbered_folders(self.folder, _RUN) if n <= number]
        for old in done:
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Remove the files of an earlier run; others in the folder are kept."""
        if not (self.writes and entries(self.folder, OWN)):
            return
        logger.warning(f"removing the files of an earlier compression run in {self.folder}")
        # First the folder that all others build on, so that no run resumes from the rest.
        dense = os.path.join(self.folder, f"{_STAGE}0")
        if os.path.isdir(dense):
            if os.path.isdir(dense + PART):
                shutil.rmtree(dense + PART)
            os.replace(dense, dense + PART)
        remove_entries(self.folder, OWN)

    def run_folder(self, number: int) -> str:
        """Return the ``output_dir`` of a stage's finetuning."""
        return os.path.join(self.folder, f"{_RUN}{number}")

    def checkpoint(self, number: int) -> str | None:
        """Return the newest complete checkpoint of a stage's finetuning, if any, on all ranks."""
        if self.folder is None:
            return None
        folder = self.run_folder(number)
        checkpoint, defects = newest_complete_checkpoint(folder, _checkpoint_defect)
        for damaged, defect in defects.items():
            self._skip(damaged, defect)
        return checkpoint


def _checkpoint_defect(folder: str) -> str | None:
    """Return the file of a checkpoint that is missing or damaged, if any."""
    if has_list(folder):
        return find_defect(folder, checksums=is_rank_0())  # the other ranks read the same files
    return checkpoint_defect(folder, required=(MEMORY_NAME,))


def _stage_defect(folder: str) -> str | None:
    """Return the file of a stage that is missing or damaged, if any."""
    if has_list(folder):
        return find_defect(folder)
    content = _read_content(folder)
    if not (isinstance(content, dict) and content.keys() >= _KEYS):
        return _CONTENT
    return None if is_complete(os.path.join(folder, _TENSORS)) else _TENSORS


def _read_content(folder: str) -> Any:
    """Return the content of a stage; None if there is none."""
    try:
        with open(os.path.join(folder, _CONTENT), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
