"""Checkpoints of a ``Trainer`` from which the training of a packed model resumes bit for bit."""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..callback import checkpoint_folder
from ..distributed import copy_into
from ..files.durable import flush_folder, new_file, write_list

logger = logging.get_logger(__name__)

MEMORY_NAME = "memory.safetensors"


def in_memory_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers as they are in memory, tied ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


@torch.no_grad()
def load_in_memory_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the result of :func:`in_memory_tensors` into a model, if it has the same structure."""
    current = in_memory_tensors(model)
    different = sorted(
        name
        for name in current.keys() | tensors.keys()
        if name not in current or name not in tensors or current[name].shape != tensors[name].shape
    )
    if different:
        raise ValueError(
            "cannot resume: the trainer's model differs from the compressed one in "
            f"{', '.join(different[:3])}; create the trainer with the same model"
        )
    for name, tensor in current.items():
        copy_into(tensor, tensors[name])


def save_tensors(tensors: dict[str, Tensor], path: str) -> None:
    """Write tensors of any device to a safetensors file."""
    save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, path)


class ExactCheckpoints(TrainerCallback):
    """Adds a model's tensors as they are in memory to a trainer's checkpoints, and restores them.

    Centroids have ``codebook_bits`` in files, and more precision in training. With this callback a
    resumed training is bit-equal to an uninterrupted one. It reads the checkpoint in ``output_dir``
    of the step that training resumes from.

    Args:
        trainer: the trainer to which the callback is added, on one process or with DDP.

    Example:
        >>> trainer.add_callback(ExactCheckpoints(trainer))
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def gather_model(self) -> nn.Module:
        """Return the model with the current weights; called on all ranks."""
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "ExactCheckpoints cannot save the sharded model of FSDP or DeepSpeed; remove it "
                "from the callbacks, or train on one process or with DDP"
            )
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the tensors once all ranks have written their files.

        Only the list of files is written after them.
        """
        model = self.gather_model()
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = checkpoint_folder(args, state)
            flush_folder(folder)
            with new_file(os.path.join(folder, MEMORY_NAME)) as part:
                save_tensors(in_memory_tensors(model), part)
            write_list(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the tensors in a resumed run; warn if the checkpoint has none."""
        path = os.path.join(checkpoint_folder(args, state), MEMORY_NAME)
        if state.global_step == 0:
            return
        if os.path.isfile(path):
            load_in_memory_tensors(self.trainer.model, load_file(path))
        else:
            logger.warning(f"training resumes from rounded values: there is no {path}")
