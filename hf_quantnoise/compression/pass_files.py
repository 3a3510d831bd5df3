"""What a staged pass leaves on disk, so that it can go on after it was killed at any moment.

    <output_dir>/compression/stage-0/      the dense model; the teacher of a resumed pass, too
    <output_dir>/compression/stage-2/      the model after its second stage, as it was in memory
    <output_dir>/compression/run-3/        checkpoints of the third stage's finetuning

A stage's folder is written under another name and moved when it is whole; a checkpoint counts once
its last file is there. Tensors are kept as they are in memory (a file of the compressed model has
16-bit centroids where training goes on with 32), so that a resumed pass is the same bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..distributed import put_into

logger = logging.get_logger(__name__)

FOLDER = "compression"
_STAGE, _RUN, _PART = "stage-", "run-", ".part"
_CONTENT, _TENSORS, _OPTIMIZER = "stage.json", "tensors.safetensors", "optimizer.pt"
# The last file of a whole checkpoint.
MEMORY_NAME = "memory.safetensors"


def tensors_in_memory(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model as they are, each once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def put_into_memory(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`tensors_in_memory`, into a model of the same structure.

    Raises:
        ValueError: if the model has other tensors; it may be changed in part then.
    """
    own = tensors_in_memory(model)
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
        put_into(tensor, tensors[name])


def write_tensors(tensors: dict[str, Tensor], path: str) -> None:
    """A safetensors file that is there whole or not at all."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, path + _PART)
    os.replace(path + _PART, path)


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

    def optimizer(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> the optimizer's state of it; empty where it was not kept."""
        path = os.path.join(self.folder, _OPTIMIZER)
        return torch.load(path, weights_only=True) if os.path.isfile(path) else {}


class PassFiles:
    """The files of a pass.

    Args:
        folder: where they are; ``None`` for a pass that leaves none.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: str | None, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes and folder is not None

    def stages(self) -> list[SavedStage]:
        """The stages that are whole, in order."""
        if self.folder is None or not os.path.isdir(self.folder):
            return []
        found = []
        for name in os.listdir(self.folder):
            if not re.fullmatch(rf"{_STAGE}\d+", name):
                continue
            folder = os.path.join(self.folder, name)
            with open(os.path.join(folder, _CONTENT), encoding="utf-8") as file:
                found.append(SavedStage(int(name.removeprefix(_STAGE)), json.load(file), folder))
        return sorted(found, key=lambda stage: stage.number)

    def save_stage(
        self,
        number: int,
        model: nn.Module,
        content: dict[str, Any],
        optimizer: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Writes a finished stage; only the dense model and the newest stage are kept."""
        if not self.writes:
            return
        folder = os.path.join(self.folder, f"{_STAGE}{number}")
        shutil.rmtree(folder + _PART, ignore_errors=True)
        os.makedirs(folder + _PART)
        write_tensors(tensors_in_memory(model), os.path.join(folder + _PART, _TENSORS))
        if optimizer:
            torch.save(optimizer, os.path.join(folder + _PART, _OPTIMIZER))
        with open(os.path.join(folder + _PART, _CONTENT), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
        os.replace(folder + _PART, folder)
        for stage in self.stages():
            if 0 < stage.number < number:
                shutil.rmtree(stage.folder)
        shutil.rmtree(self.run_folder(number), ignore_errors=True)

    def clear(self) -> None:
        """Removes what an earlier pass left."""
        if self.writes and os.path.isdir(self.folder):
            logger.warning(f"the files of an earlier pass in {self.folder} are removed")
            shutil.rmtree(self.folder)

    def run_folder(self, number: int) -> str:
        """The ``output_dir`` of a stage's finetuning."""
        return os.path.join(self.folder, f"{_RUN}{number}")

    def checkpoint(self, number: int) -> str | None:
        """The newest whole checkpoint of a stage's finetuning; torn ones are passed over."""
        if self.folder is None or not os.path.isdir(self.run_folder(number)):
            return None
        steps = []
        for name in os.listdir(self.run_folder(number)):
            folder = os.path.join(self.run_folder(number), name)
            if not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name):
                continue
            if os.path.isfile(os.path.join(folder, MEMORY_NAME)):
                steps.append(int(name.rpartition("-")[2]))
            else:
                logger.warning(f"{folder} was not written to its end; it is passed over")
                if self.writes:
                    shutil.rmtree(folder)
        if not steps:
            return None
        return os.path.join(self.run_folder(number), f"{PREFIX_CHECKPOINT_DIR}-{max(steps)}")
