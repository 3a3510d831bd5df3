"""What a staged pass leaves on disk, so that it can go on after it was killed at any moment.

    <output_dir>/compression/stage-0/      the dense model; the teacher of a resumed pass, too
    <output_dir>/compression/stage-2/      the model after its second stage, as it was in memory
    <output_dir>/compression/run-3/        checkpoints of the third stage's finetuning

A stage's folder is written under another name and moved when it is whole; a checkpoint counts once
its last file is there. Both happen when all files have reached the disk, since machines stop as
well as processes; what is found torn all the same is passed over. Tensors are kept as they are in
memory (a file of the compressed model has 16-bit centroids where training goes on with 32), so that
a resumed pass is the same bit for bit.

From where a pass goes on is for rank 0 to say. All ranks read the files, so all machines of a run
must share the folder.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from ..distributed import broadcast_object, copy_into, is_rank_0, raise_on_all_ranks
from .trainer_checkpoints import is_whole, newest_complete_checkpoint, not_shared, numbered

logger = logging.get_logger(__name__)

FOLDER = "compression"
_STAGE, _RUN, _PART = "stage-", "run-", ".part"
_CONTENT, _TENSORS = "stage.json", "tensors.safetensors"
# The last file of a whole checkpoint.
MEMORY_NAME = "memory.safetensors"


def in_memory_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model as they are, each once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def load_in_memory_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`in_memory_tensors`, into a model of the same structure.

    Raises:
        ValueError: if the model has other tensors; it may be changed in part then.
    """
    own = in_memory_tensors(model)
    odd = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if odd:
        raise ValueError(
            f"resume_from_checkpoint: the trainer's model is another than the one that was "
            f"compressed, they differ in {', '.join(odd[:3])}; give the trainer the same model"
        )
    for name, tensor in own.items():
        copy_into(tensor, tensors[name])


def write_tensors(tensors: dict[str, Tensor], path: str) -> None:
    """A safetensors file that is there whole or not at all."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, path + _PART)
    _flush(path + _PART)
    os.replace(path + _PART, path)
    _flush(os.path.dirname(path))


def flush_to_disk(folder: str) -> None:
    """Waits until all that is in a folder is on the disk."""
    for inside, _, names in os.walk(folder):
        for name in names:
            _flush(os.path.join(inside, name))
        _flush(inside)


def _flush(path: str) -> None:
    if os.name != "posix":  # elsewhere folders have no descriptors
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class SavedStage:
    """A finished stage on disk.

    Attributes:
        number: 0 for the dense model.
        content: the config asked for, the arguments, the plan so far, the records.
        folder: where its tensors are.
    """

    number: int
    content: dict[str, Any]
    folder: str

    def tensors(self) -> dict[str, Tensor]:
        """The model."""
        return load_file(os.path.join(self.folder, _TENSORS))


class StageCheckpoints:
    """The files of a pass.

    Args:
        folder: where they are; ``None`` for a pass that leaves none.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: str | None, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes and folder is not None

    def stages(self) -> list[SavedStage]:
        """The stages that are whole, in order; none without the dense model, which every later one
        builds on. As rank 0 finds them; on all ranks.

        Raises:
            ValueError: on all ranks, where one does not find the same.
        """
        chosen: list[SavedStage] = broadcast_object(self._own_stages() if is_rank_0() else None)
        found = [
            replace(stage, folder=os.path.join(self.folder, os.path.basename(stage.folder)))
            for stage in chosen
        ]
        with raise_on_all_ranks():
            for stage in found:
                # As text: a figure that is no number is not equal to itself.
                if json.dumps(_content_of(stage.folder)) != json.dumps(stage.content):
                    raise not_shared(stage.folder)
        return found

    def _own_stages(self) -> list[SavedStage]:
        found = []
        for number, folder in numbered(self.folder, _STAGE):
            content = _content_of(folder)
            if content is None:
                self._pass_over(folder)
            else:
                found.append(SavedStage(number, content, folder))
        return found if found and found[0].number == 0 else []

    def _pass_over(self, folder: str) -> None:
        logger.warning(f"{folder} is not whole; it is passed over")
        if self.writes:
            shutil.rmtree(folder, ignore_errors=True)

    def save_stage(
        self,
        number: int,
        model: nn.Module,
        content: dict[str, Any],
    ) -> None:
        """Writes a finished stage; only the dense model and the newest stage are kept.

        Args:
            number, model, content: as in :class:`SavedStage`.
        """
        if not self.writes:
            return
        folder = os.path.join(self.folder, f"{_STAGE}{number}")
        shutil.rmtree(folder + _PART, ignore_errors=True)
        os.makedirs(folder + _PART)
        write_tensors(in_memory_tensors(model), os.path.join(folder + _PART, _TENSORS))
        with open(os.path.join(folder + _PART, _CONTENT), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
        flush_to_disk(folder + _PART)
        shutil.rmtree(folder, ignore_errors=True)  # torn, on another machine than rank 0's
        os.replace(folder + _PART, folder)
        _flush(self.folder)
        done = [old for n, old in numbered(self.folder, _STAGE) if 0 < n < number]
        done += [old for n, old in numbered(self.folder, _RUN) if n <= number]
        for old in done:
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Removes what an earlier pass left."""
        if self.writes and os.path.isdir(self.folder):
            logger.warning(f"the files of an earlier pass in {self.folder} are removed")
            # First what all else builds on: half of an earlier pass is none to go on from.
            dense = os.path.join(self.folder, f"{_STAGE}0", _CONTENT)
            if os.path.isfile(dense):
                os.unlink(dense)
            shutil.rmtree(self.folder)

    def run_folder(self, number: int) -> str:
        """The ``output_dir`` of a stage's finetuning."""
        return os.path.join(self.folder, f"{_RUN}{number}")

    def checkpoint(self, number: int) -> str | None:
        """The newest whole checkpoint of a stage's finetuning; torn ones are passed over. As rank 0
        finds it; on all ranks.

        Raises:
            ValueError: on all ranks, where one does not find it.
        """
        if self.folder is None:
            return None
        checkpoint, torn = newest_complete_checkpoint(self.run_folder(number), _flaw_of_checkpoint)
        for folder in torn:
            self._pass_over(folder)
        return checkpoint


def _flaw_of_checkpoint(folder: str) -> str | None:
    """The last file of a checkpoint vouches for the others, which have reached the disk before."""
    return None if is_whole(os.path.join(folder, MEMORY_NAME)) else MEMORY_NAME


def _content_of(folder: str) -> dict[str, Any] | None:
    """What is known of a saved stage; None where its files are not whole."""
    try:
        with open(os.path.join(folder, _CONTENT), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    return content if is_whole(os.path.join(folder, _TENSORS)) else None
