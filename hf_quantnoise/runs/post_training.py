"""``--noise_after_finetuning``: training with noise, distilled from the finetuned model."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, get_last_checkpoint

from ..compression import allocate_bits
from ..compression.calibration import lookups_in_training, training_batches
from ..compression.reporting.console import is_quiet, shows_progress
from ..configuration import IPQConfig, QuantizedModelConfig, QuantNoiseConfig
from ..configuration.layer_storage import SELECTION
from ..configuration.options import changed_options
from ..files.durable import write_json
from ..recipes import size_target
from ..trainer import QuantNoiseTrainer
from .arguments import Arguments
from .config_flags import SHARED
from .folders import ALLOCATION
from .recipe_flags import BLOCKS

logger = logging.getLogger(__name__)


def train_with_noise(
    args: Arguments,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    folder: str,
    resume: bool,
    parts: dict[str, Any],
) -> tuple[QuantNoiseTrainer, QuantizedModelConfig, dict[str, float]]:
    """Train a finetuned model with noise (section 5.3).

    Args:
        args: of the run.
        model: the finetuned model.
        teacher: None trains on the labels.
        folder: folder of the checkpoints.
        resume: continue from the newest of these checkpoints, if there is one.
        parts: arguments of any Trainer: datasets, collator, metrics, processing class.

    Returns:
        The trainer, whose further output goes to the folder of the run; how to store the model; and
        the metrics.
    """
    # Rank 0 must not write the allocation before the others have looked for an earlier one.
    args.training.distributed_state.wait_for_everyone()
    noise, quantization = args.noise, args.quantization
    if args.allocated_family is not None:
        quantization = _allocation(args, model, folder, parts)
        noise = _matching(quantization, model, args.noise, args.noise_selection)
    trainer = QuantNoiseTrainer(
        model,
        _training_arguments(args, folder),
        noise,
        teacher=teacher,
        compression_args=args.compression,
        **parts,
    )
    checkpoint = _has_checkpoint(folder) if resume else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.args.output_dir = args.training.output_dir
    return trainer, quantization, metrics


def _allocation(
    args: Arguments, model: PreTrainedModel, folder: str, parts: dict[str, Any]
) -> IPQConfig:
    """Return how a recipe stores the finetuned model: with bits allocated on training batches."""
    path = os.path.join(folder, ALLOCATION)
    if not os.path.isfile(path):  # else resumed
        trainer = Trainer(model, _training_arguments(args, folder), **parts)
        target = size_target(str(args.flags.recipe), model, str(args.allocated_family))
        target.seed = args.quantization.seed
        lookups = lookups_in_training(trainer, model, target, args.compression)
        batches = list(training_batches(trainer, args.compression.budget_batches))
        shown = shows_progress(trainer), not is_quiet(trainer.args)  # bars, table
        config = allocate_bits(model, target, batches, *shown, lookups=lookups)
        if args.training.should_save:
            os.makedirs(folder, exist_ok=True)
            write_json(config.to_dict(), path)
        args.training.distributed_state.wait_for_everyone()
        return config
    with open(path, encoding="utf-8") as file:
        return IPQConfig.from_dict(json.load(file))


def _matching(
    quantization: IPQConfig,
    model: PreTrainedModel,
    noise: QuantNoiseConfig,
    selection: dict[str, Any],
) -> QuantNoiseConfig:
    """Return the noise with the blocks of another storage, on layers of a selection."""
    own = changed_options(noise)
    options = {name: own[name] for name in own if name not in (*BLOCKS, *SHARED, *SELECTION)}
    return QuantNoiseConfig.matching(quantization, model, **options, **selection)


def _has_checkpoint(folder: str) -> bool | None:
    """Return True if there is a checkpoint to resume from, else None."""
    try:
        found = get_last_checkpoint(folder)
    except FileNotFoundError:
        found = None
    if found is None:
        logger.warning("nothing to resume in %s: starting from the finetuned model", folder)
        return None
    return True


def _training_arguments(args: Arguments, folder: str) -> TrainingArguments:
    """Return the arguments of the finetuning with another length, learning rate and folder."""
    training, flags = args.training, args.flags
    length = flags.noise_after_finetuning
    changes: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": length * training.num_train_epochs,
        # In evaluation the model is not quantized, so its metrics choose no checkpoint.
        "eval_strategy": IntervalStrategy.NO,
        "load_best_model_at_end": False,
    }
    if training.max_steps > 0:
        changes["max_steps"] = math.ceil(length * training.max_steps)
    if flags.noise_learning_rate is not None:
        changes["learning_rate"] = flags.noise_learning_rate
    if training.save_strategy == SaveStrategy.BEST:
        changes["save_strategy"] = SaveStrategy.EPOCH
    changed = copy.copy(training)  # see stage_training_arguments
    vars(changed).update(changes)
    return changed
