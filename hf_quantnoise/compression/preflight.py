"""Checks that run before compression starts.

Each stage has its own trainer, for parameters that do not exist when the user's trainer is created.
What the user passed to their trainer is passed on to the stages if possible, and refused here if
not.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import SchedulerType, has_length
from transformers.utils import logging

from ..argument_checks import require_dataset, require_instance
from ..configuration import QuantizedModelConfig
from ..hub.card import LATENT
from ..modeling.activations import require_batches
from ..modeling.packable import check_can_be_packed
from ..modeling.plan import stages_for
from .arguments import CompressionArguments
from .distillation.teacher import require_distillation, require_teacher
from .fitted_noise import data_needed_by
from .training.pending_noise import noise_to_keep

logger = logging.get_logger(__name__)

# They follow evaluations, but a stage is not evaluated during training.
_EVALUATION_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
# Methods of Trainer that a subclass may override -> what to pass to the trainer instead.
_OPTIMIZER = "optimizer_cls_and_kwargs, or TrainingArguments(optim=...),"
_SCHEDULE = "TrainingArguments(lr_scheduler_type=..., lr_scheduler_kwargs=...)"
_TRAINING = {
    "create_optimizer": _OPTIMIZER,
    "create_scheduler": _SCHEDULE,
    "create_optimizer_and_scheduler": _OPTIMIZER,
    "training_step": "compute_loss_func",
}
_TRAINING_DATA = {
    "get_train_dataloader": "train_dataset and data_collator",
    "_get_train_sampler": "TrainingArguments(train_sampling_strategy=...)",
}
_EVALUATION = {
    "get_eval_dataloader": "eval_dataset and data_collator",
    "evaluate": "compute_metrics",
    "evaluation_loop": "compute_metrics",
    "prediction_step": "preprocess_logits_for_metrics",
}
_KNOWN_PACKAGES = ("transformers.", __name__.partition(".")[0] + ".")


def check_compression(
    trainer: Trainer,
    config: QuantizedModelConfig,
    args: CompressionArguments,
    teacher: nn.Module | None = None,
) -> None:
    """Check the settings of a compression run; can be called before training, too.

    Raises:
        TypeError: if the config is not one for storage, the model not a ``PreTrainedModel``, or
            another argument something else.
        ValueError: if a stage has no training data or an unknown length, the settings contradict
            each other, the config, the teacher or the trainer, or the trainer has something that
            stages cannot use.
    """
    require_instance(
        "config", config, QuantizedModelConfig, "an IPQConfig or a FixedPointConfig",
        "call e.g. compress(IPQConfig(block_size=4))",
    )  # fmt: skip
    require_instance(
        "compression_args", args, CompressionArguments, "CompressionArguments",
        "pass e.g. CompressionArguments(stage_epochs=1), since batch size and optimizer are those "
        "of the trainer's TrainingArguments",
    )  # fmt: skip
    require_teacher(teacher)
    if trainer.model is None:
        raise ValueError(
            "the trainer has no model, as after a hyperparameter search; call train() before "
            "compress"
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_can_be_packed(model)
    stages = stages_for(config, model)
    args.check_stages(stages)
    trains = args.trains(stages)
    if trainer.train_dataset is None:
        if trains:
            raise ValueError(
                "train_dataset=None: compress finetunes between stages; pass a train_dataset to "
                "the trainer, or set CompressionArguments(stage_epochs=0)"
            )
        if field := data_needed_by(config, model):
            require_batches([], field)
    if trainer.eval_dataset is not None:
        _require_evaluation_in_own_dtype(trainer)
    if trains:
        require_distillation(args, teacher)
        _require_trained_parameters(model)
        require_dataset("train_dataset", trainer.train_dataset)
        if has_length(trainer.train_dataset) and not len(trainer.train_dataset):
            raise ValueError(
                "invalid train_dataset: it is empty, expected at least one example; pass another, "
                "or set CompressionArguments(stage_epochs=0)"
            )
        _require_known_lengths(trainer, args, stages)
        _require_recreatable_optimizer(trainer)
    _require_stock_methods(trainer, config, args, trains)
    noise_to_keep(trainer, args.keep_noise)


def warn_of_latent_teacher(name: str) -> None:
    """Warn if stages are distilled from latent weights.

    Args:
        name: see :func:`name_of_uncompressed`.
    """
    if name == LATENT:
        logger.warning(
            "teacher=None after noise of rate 1: stages are distilled from the weights without "
            "noise, which may be far worse than the trained model. Pass the teacher of the "
            "training as teacher=..., or keep the model as it was trained with "
            "CompressionArguments(stage_epochs=0)"
        )


def _require_trained_parameters(model: nn.Module) -> None:
    """Refuse a model that is frozen completely, before its first stage is packed."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "invalid model: all parameters are frozen (requires_grad=False), so no stage can be "
            "finetuned; call model.requires_grad_(True), or set "
            "CompressionArguments(stage_epochs=0)"
        )


def _require_known_lengths(
    trainer: Trainer, args: CompressionArguments, stages: Iterable[str | None]
) -> None:
    """Refuse epochs of data of unknown length. ``max_steps`` of the trainer is not for stages."""
    by_epochs = any(each.trains and each.steps is None for each in map(args.settings_of, stages))
    if by_epochs and not has_length(trainer.train_dataset):
        raise ValueError(
            f"train_dataset={type(trainer.train_dataset).__name__}(...) has no length, so a stage "
            "cannot be finetuned for a number of epochs; set CompressionArguments(stage_steps=...)"
            ' or "steps" in stage_settings'
        )


def _require_evaluation_in_own_dtype(trainer: Trainer) -> None:
    """Refuse evaluations that convert the model itself, which the next stage would train."""
    for name, other in (("bf16_full_eval", "bf16"), ("fp16_full_eval", "fp16")):
        if getattr(trainer.args, name):
            raise ValueError(
                f"invalid {name}=True: each evaluation of compress would convert the model to 16 "
                f"bits, and later stages would train these weights; set {name}=False before the "
                f"first evaluation, and {other}=True to evaluate with autocast"
            )


def _require_recreatable_optimizer(trainer: Trainer) -> None:
    """Refuse an optimizer or a schedule that the trainer of a stage cannot create."""
    schedule = SchedulerType(trainer.args.lr_scheduler_type).value
    if schedule in _EVALUATION_SCHEDULES:
        raise ValueError(
            f"invalid lr_scheduler_type={schedule!r}: it follows evaluations, but stages are not "
            "evaluated during training; set e.g. trainer.args.lr_scheduler_type = 'linear' before "
            "compress"
        )
    if bound := getattr(trainer, "bound_optimizer", None):
        raise ValueError(
            f"invalid {bound}: it holds the parameters of the dense model, but each stage has "
            "others; pass optimizer_cls_and_kwargs=(class, arguments) to QuantNoiseTrainer instead,"
            " or set CompressionArguments(stage_epochs=0)"
        )


def _require_stock_methods(
    trainer: Trainer, config: QuantizedModelConfig, args: CompressionArguments, trains: bool
) -> None:
    """Refuse a subclass of the trainer with overridden methods that a stage would have to call."""
    methods: dict[str, str] = {}
    if trains:
        methods |= _TRAINING
        if not args.distill or args.distill_weight < 1:  # else the loss of the labels is not used
            methods["compute_loss"] = "compute_loss_func"
    if trains or config.reads_data:
        methods |= _TRAINING_DATA
    if trainer.eval_dataset is not None:
        methods |= _EVALUATION
    for name, instead in methods.items():
        if _is_overridden(trainer, name):
            untrained = "CompressionArguments(stage_epochs=0)"
            without = "eval_dataset=None" if name in _EVALUATION else untrained
            raise ValueError(
                f"{type(trainer).__name__}.{name} is not used by compress, since each stage has "
                f"its own trainer; pass {instead} to the trainer instead, or set {without}"
            )


def _is_overridden(trainer: Trainer, name: str) -> bool:
    if name in vars(trainer):
        return True
    owner = next((kind for kind in type(trainer).__mro__ if name in vars(kind)), None)
    return owner is not None and not f"{owner.__module__}.".startswith(_KNOWN_PACKAGES)
