"""What is told of a staged pass before it begins: which settings it cannot be carried out with.

Each stage has a trainer of its own, over parameters that are not there when the run's trainer is
made. What that one was given is handed on to them where it can be; the rest is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import Trainer
from transformers.trainer_utils import SchedulerType, has_length

from ..configuration import QuantizedModelConfig
from ..modeling.activations import require_batches
from ..modeling.packer import check_can_be_packed
from .arguments import CompressionArguments
from .training.pending_noise import noise_to_keep

# They wait for evaluations, and a stage is not evaluated while it is trained.
_SCHEDULES_THAT_WAIT = ("reduce_lr_on_plateau", "greedy")
# Methods of Trainer that a subclass may have of its own -> what to give a trainer instead.
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
_OWN = ("transformers.", __name__.partition(".")[0] + ".")


def check_compression(
    trainer: Trainer, config: QuantizedModelConfig, args: CompressionArguments
) -> None:
    """What can be told of a pass by its settings alone; before the training that leads to it, too.

    Raises:
        ValueError: if a stage has no training data or no known length, the settings name stages
            that are none or contradict each other or the trainer's, or the trainer has what no
            stage can heed.
    """
    stages = config.stage_groups()
    args.check_stages(stages)
    if trainer.train_dataset is None:
        if args.trains(stages):
            raise ValueError(
                "compress finetunes between stages and the trainer has no train_dataset; give "
                "it one, or set CompressionArguments(stage_epochs=0)"
            )
        if config.reads_data:
            require_batches([], config.reads_data)
    if args.trains(stages):
        _require_known_lengths(trainer, args, stages)
        _require_own_optimizers(trainer)
    _require_stock_methods(trainer, config, args)
    noise_to_keep(trainer, args.keep_noise)
    check_can_be_packed(trainer.accelerator.unwrap_model(trainer.model))


def _require_known_lengths(
    trainer: Trainer, args: CompressionArguments, stages: Iterable[str | None]
) -> None:
    """Refuses epochs of data whose length nobody knows; the run's ``max_steps`` is no stage's."""
    settings = map(args.of_stage, stages)
    if not has_length(trainer.train_dataset) and any(
        s.trains and s.steps is None for s in settings
    ):
        raise ValueError(
            f"the train_dataset, a {type(trainer.train_dataset).__name__}, does not say how many "
            "examples it has, so a stage cannot be finetuned for epochs; set "
            'CompressionArguments(stage_steps=...), or "steps" in stage_settings'
        )


def _require_own_optimizers(trainer: Trainer) -> None:
    """Refuses an optimizer or a schedule that the trainer of a stage cannot make anew."""
    schedule = SchedulerType(trainer.args.lr_scheduler_type).value
    if schedule in _SCHEDULES_THAT_WAIT:
        raise ValueError(
            f"lr_scheduler_type={schedule!r} goes by evaluations, and a stage is not evaluated "
            "while it is trained; set it to another, e.g. trainer.args.lr_scheduler_type = "
            "'linear', before compress"
        )
    if bound := getattr(trainer, "bound_optimizer", None):
        raise ValueError(
            f"{bound}: it was made for the parameters of the dense model, and each stage of "
            "compress has others; give QuantNoiseTrainer optimizer_cls_and_kwargs=(its class, its "
            "arguments) instead, which the stages take over, call compress on a trainer that was "
            "made without it, or set CompressionArguments(stage_epochs=0)"
        )


def _require_stock_methods(
    trainer: Trainer, config: QuantizedModelConfig, args: CompressionArguments
) -> None:
    """Refuses a subclass of the trainer whose own methods a stage would have to call."""
    trains = args.trains(config.stage_groups())
    methods = {}
    if trains:
        methods |= _TRAINING
        if not args.distill or args.distill_weight < 1:  # else the labels' loss is not trained
            methods["compute_loss"] = "compute_loss_func"
    if trains or config.reads_data:
        methods |= _TRAINING_DATA
    if trainer.eval_dataset is not None:
        methods |= _EVALUATION
    for name, instead in methods.items():
        if _is_overridden(trainer, name):
            evaluates = name in _EVALUATION
            without = "eval_dataset=None" if evaluates else "CompressionArguments(stage_epochs=0)"
            raise ValueError(
                f"{type(trainer).__name__}.{name}: each stage of compress has a trainer of its "
                f"own, which does not have this method; give {instead} to the trainer instead, "
                f"or set {without}"
            )


def _is_overridden(trainer: Trainer, name: str) -> bool:
    if name in vars(trainer):
        return True
    owner = next((kind for kind in type(trainer).__mro__ if name in vars(kind)), None)
    return owner is not None and not f"{owner.__module__}.".startswith(_OWN)
