"""A trainer whose checkpoints hold the model as it is in memory."""

from __future__ import annotations

import os

from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints import (
    MEMORY_NAME,
    flush_to_disk,
    in_memory_tensors,
    load_in_memory_tensors,
    write_tensors,
)
from .packed_trainer import PackedModelTrainer


class _KeepsMemory(TrainerCallback):
    """Adds the last file to a checkpoint; one without it was torn."""

    def __init__(self, trainer: PackedModelTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        """Writes the tensors as they are in memory, once all ranks have written what is theirs."""
        model = self.trainer.up_to_date_model()
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            folder = os.path.join(args.output_dir, name)
            flush_to_disk(folder)
            write_tensors(in_memory_tensors(model), os.path.join(folder, MEMORY_NAME))


class ResumableTrainer(PackedModelTrainer):
    """``PackedModelTrainer`` that resumes bit for bit."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_KeepsMemory(self))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, MEMORY_NAME)
        if os.path.isfile(path):
            target = self.model if model is None else model
            load_in_memory_tensors(target, load_file(path))
