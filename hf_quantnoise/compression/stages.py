"""The staged pass: pack a stage, finetune centroids and all that is still dense, evaluate, go on.

Each stage has a trainer of its own. A running trainer's optimizer, scheduler and wrapped model do
not know parameters that are born under it; a fresh one does.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..configuration import QuantizedModelConfig
from ..hub.card import format_metrics
from ..hub.packer import ModelPacker, StageResult, check_can_be_packed
from ..modeling.activations import calibrate, require_batches
from ..size import size_report
from .arguments import CompressionArguments
from .oneshot import without_noise
from .reassign import require_centroids
from .stage_trainer import StageTrainer


@dataclass
class StageRecord:
    """What one stage did.

    Attributes:
        stage: structure group or regex; ``"dense"`` for the model before the pass,
            ``"restructured"`` after layers were taken out or shared.
        layers: number of layers packed in it.
        relative_error: ||W - W_q||^2 / ||W||^2 over those layers, before finetuning.
        metric: what ``evaluate`` gave after the stage's finetuning; empty without an eval set.
        mb: size on disk so far, in 10^6 bytes.
        seconds: wall time of the stage.
        finetuning: what the stage's ``train`` returned; empty without finetuning.
    """

    stage: str
    layers: int
    relative_error: float
    mb: float
    seconds: float
    metric: dict[str, float] = field(default_factory=dict)
    finetuning: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.stage:<12} {self.layers:>4} layers  relative error {self.relative_error:.4f}  "
            f"{self.mb:8.3f} MB  {self.seconds:7.1f} s  "
            f"{format_metrics(self.metric)}"
        )


def _stage_arguments(
    args: TrainingArguments, compression_args: CompressionArguments, number: int
) -> TrainingArguments:
    """The run's own arguments with the stage's length and learning rate; nothing is written."""
    stage = copy.copy(args)
    changes = {
        "num_train_epochs": compression_args.stage_epochs,
        "max_steps": -1,
        "warmup_steps": 0,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "seed": args.seed + number,
    }
    if compression_args.stage_learning_rate is not None:
        changes["learning_rate"] = compression_args.stage_learning_rate
    for name, value in changes.items():
        setattr(stage, name, value)
    return stage


def _teacher_of(
    model: nn.Module, given: nn.Module | None, compression_args: CompressionArguments
) -> nn.Module | None:
    if not compression_args.distill or compression_args.stage_epochs == 0:
        return None
    teacher = copy.deepcopy(model) if given is None else given
    return teacher.eval().requires_grad_(False).to(next(model.parameters()).device)


def compress_in_stages(
    trainer: Trainer,
    config: QuantizedModelConfig,
    compression_args: CompressionArguments | None = None,
    teacher: nn.Module | None = None,
    report: Callable[[StageRecord], None] | None = None,
) -> PreTrainedModel:
    """Quantizes a trainer's model stage by stage, in place.

    Args:
        trainer: gives the model, its data, metrics and arguments.
        config: what to produce; its ``stages`` are the order.
        compression_args: how to finetune between stages.
        teacher: the model to learn from; None takes a frozen copy of the model itself.
        report: called with the record of the dense model, then of each stage as it comes.

    Returns:
        The packed model.

    Raises:
        ValueError: before anything is changed, if the config cannot be carried out or a stage has
            no training data.
    """
    compression_args = compression_args or CompressionArguments()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.train_dataset is None:
        if compression_args.stage_epochs > 0:
            raise ValueError(
                "compress finetunes between stages and the trainer has no train_dataset; give it "
                "one, or set CompressionArguments(stage_epochs=0)"
            )
        if config.reads_data:
            require_batches([], config.reads_data)
    require_centroids(config, compression_args)
    check_can_be_packed(model)
    packer = ModelPacker(model, without_noise(model, config))
    report = report or (lambda record: None)
    start = time.perf_counter()
    stage_trainer = _stage_trainer(trainer, model, compression_args, None, 0)
    report(_record("dense", stage_trainer, start))
    teacher = _teacher_of(model, teacher, compression_args)
    if packer.restructuring.changes:
        start = time.perf_counter()
        packer.restructure()
        stage_trainer = _stage_trainer(trainer, model, compression_args, None, 0)
        report(_record("restructured", stage_trainer, start))
    for number, stage in enumerate(tqdm(packer.stages, desc="stages", unit="stage"), 1):
        start = time.perf_counter()
        data = _calibration(stage_trainer, model) if config.weighs_errors else ()
        packed = packer.pack_stage(stage, True, *data)
        stage_trainer = _stage_trainer(trainer, model, compression_args, teacher, number)
        _calibrate(stage_trainer, model, packed)
        finetuning = {}
        if compression_args.stage_epochs > 0:
            finetuning = stage_trainer.train().metrics
            model.eval()
        report(_record(stage or "all", stage_trainer, start, packed, finetuning))
    return model


def _calibrate(stage_trainer: StageTrainer, model: PreTrainedModel, packed: StageResult) -> None:
    """Sets the scales of what enters the layers of a stage, on its training data (7.7)."""
    layers = [model.get_submodule(name) for name in packed.layers]
    if all(layer.activation_bits is None for layer in layers):
        return
    batches, forward = _calibration(stage_trainer, model)
    calibrate(model, layers, batches, forward)


def _calibration(
    stage_trainer: StageTrainer, model: PreTrainedModel
) -> tuple[list, Callable[[object], object]]:
    """The first training batches, and what runs one of them."""
    count = stage_trainer.compression_args.calibration_batches
    batches = list(islice(stage_trainer.get_train_dataloader(), count))
    return batches, lambda batch: stage_trainer.prediction_step(model, batch, False)


def _record(
    stage: str,
    stage_trainer: Trainer,
    start: float,
    packed: StageResult | None = None,
    finetuning: dict[str, float] | None = None,
) -> StageRecord:
    """Evaluates, and puts a stage's figures together."""
    metric = {} if stage_trainer.eval_dataset is None else stage_trainer.evaluate()
    return StageRecord(
        stage=stage,
        layers=len(packed.layers) if packed else 0,
        relative_error=packed.relative_error if packed else 0.0,
        mb=size_report(stage_trainer.model).total.disk_bytes / 1e6,
        metric=metric,
        seconds=time.perf_counter() - start,
        finetuning=finetuning or {},
    )


def _stage_trainer(
    trainer: Trainer,
    model: PreTrainedModel,
    compression_args: CompressionArguments,
    teacher: nn.Module | None,
    number: int,
) -> StageTrainer:
    return StageTrainer(
        model,
        _stage_arguments(trainer.args, compression_args, number),
        compression_args=compression_args,
        teacher=teacher,
        data_collator=trainer.data_collator,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
        compute_loss_func=trainer.compute_loss_func,
        compute_metrics=trainer.compute_metrics,
        preprocess_logits_for_metrics=trainer.preprocess_logits_for_metrics,
    )
