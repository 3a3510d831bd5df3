"""The teacher of a run: the model of ``--teacher_name_or_path``, or the finetuned one."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel, set_seed

from ..compression.distillation.teacher import Teacher
from ..hub.model_classes import load_complete
from ..trainer import QuantNoiseTrainer
from .arguments import Arguments


def load_teacher(args: Arguments) -> PreTrainedModel | None:
    """Load the model of ``--teacher_name_or_path``; None without one."""
    if (name := args.flags.teacher_name_or_path) is None:
        return None
    model = args.model
    return load_complete(args.data.auto_class, name, dtype=model.dtype, **model.teacher_hub())


def check_outputs(args: Arguments, trainer: QuantNoiseTrainer) -> None:
    """Compare the outputs of teacher and model on one batch.

    They would be compared only after the finetuning, which would be wasted if they cannot be.
    With FSDP and DeepSpeed they are not compared before.

    Raises:
        ValueError: if the teacher lacks weights or has outputs of another shape, or one of the
            models does not return what is distilled.
    """
    options, flags = args.compression, args.flags
    weights = options.distill_hidden, options.distill_attention, options.random_tokens
    is_other = flags.teacher_name_or_path is not None
    if not (args.distills and (is_other or any(weights))):
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return  # a rank may have no weights yet
    teacher = load_teacher(args) or copy.deepcopy(trainer.model)
    Teacher(trainer.model, teacher, options).check(trainer)
    set_seed(args.training.seed)  # drawing the batch changed the state
