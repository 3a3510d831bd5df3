"""The staged pass: pack a stage, finetune centroids and all that is still dense, evaluate, go on.

Each stage has a trainer of its own. A running trainer's optimizer, scheduler and wrapped model do
not know parameters that are born under it; a fresh one does, and can go on from the earlier one's
state. Where checkpoints are written at all (``save_strategy``), the pass writes its own; see
``pass_files``.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length
from transformers.utils import logging

from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from ..hub.packer import ModelPacker, StageResult
from ..modeling.activations import calibrate
from ..noise import apply_quant_noise, remove_quant_noise
from .arguments import CompressionArguments, StageSettings
from .bit_allocation.allocate import resolve_target
from .checkpoints import FOLDER, SavedStage, StageCheckpoints, load_in_memory_tensors
from .distillation.teacher import Teacher
from .fingerprint import Fingerprint, require_same_settings, settings_fingerprint
from .oneshot import without_noise
from .preflight import check_compression
from .reporting.logs import forward_logs, log_errors, log_record
from .reporting.record import StageRecord, evaluate_packed, measure_stage
from .training.data import first_batches
from .training.fsdp import share_what_rank_0_read
from .training.packed_trainer import undo_accelerate_prepare
from .training.pending_noise import PendingNoise, noise_to_keep
from .training.resumable import OptimizerState
from .training.stage_trainer import StageTrainer

logger = logging.get_logger(__name__)


class CompressionPipeline:
    """One pass over a trainer's model.

    Args:
        trainer: gives the model, its data, metrics and arguments.
        config: what to produce; its ``stages`` are the order.
        compression_args: how to finetune between stages.
        teacher: the model to learn from; None takes a frozen copy of the model itself.
        report: called with the record of the dense model, then of each stage as it comes.

    Raises:
        ValueError: if a stage has no training data, or the settings name stages that are none.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: QuantizedModelConfig,
        compression_args: CompressionArguments | None = None,
        teacher: nn.Module | None = None,
        report: Callable[[StageRecord], None] | None = None,
    ) -> None:
        self.trainer, self.config = trainer, config
        self.args = compression_args or CompressionArguments()
        check_compression(trainer, config, self.args)
        self.given_teacher, self.teacher = teacher, None
        self.report = report or (lambda record: None)
        self.model = undo_accelerate_prepare(trainer.accelerator.unwrap_model(trainer.model))
        if trainer.is_fsdp_enabled:  # else Trainer has put it there
            self.model.to(trainer.args.device)
        self.history: list[StageRecord] = []
        self.stages = config.stage_groups()
        self._trains = self.args.trains(self.stages)
        self.noise_config = noise_to_keep(trainer, self.args.keep_noise)
        keeps = trainer.args.save_strategy != SaveStrategy.NO
        folder = os.path.join(trainer.args.output_dir, FOLDER) if keeps else None
        self.files = StageCheckpoints(folder, trainer.args.should_save)
        self._bars = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
        self._optimizer_state: OptimizerState = {}

    def run(self, resume: bool = False) -> PreTrainedModel:
        """Carries the pass out, in place.

        Args:
            resume: go on from what an earlier pass with the same settings left; begin where there
                is nothing.

        Returns:
            The packed model.
        """
        saved = self._saved() if resume else []
        if not saved:
            self.files.clear()
        self.trainer.accelerator.wait_for_everyone()
        done = self._go_back(saved) if saved else self._begin()
        bar = tqdm(self.stages[done:], desc="stages", unit="stage", initial=done,
                   total=len(self.stages), disable=not self._bars)  # fmt: skip
        for number, stage in enumerate(bar, done + 1):
            bar.set_postfix_str(stage or "all")
            if stage in self.packer.stages:  # layer_quantizers may leave all of it dense
                self._stage(number, stage)
        return self.model.eval()

    # ---- from where it starts -------------------------------------------------------------------

    def _begin(self) -> int:
        batches = first_batches(self.trainer, self.args.budget_batches)
        config = without_noise(self.model, self.config)
        config = resolve_target(self.model, config, batches, self._bars, table=True)
        self.packer = ModelPacker(self.model, config, on_all_ranks=True)
        start = time.perf_counter()
        self._add(measure_stage("dense", self._stage_trainer(None, 0), start))
        self._save(0)
        self._make_teacher()
        self._restructure()
        return 0

    def _restructure(self, record: bool = True) -> None:
        start = time.perf_counter()
        self.packer.restructure()
        self.noise = PendingNoise(self.model, self.noise_config)
        if self.packer.restructuring.changes and record:
            self._add(measure_stage("restructured", self._stage_trainer(None, 0), start))

    def _make_teacher(self) -> None:
        if self.args.distill and self._trains:
            if self.given_teacher is not None:
                share_what_rank_0_read(self.trainer, self.given_teacher)
            self.teacher = Teacher(self.model, self.given_teacher, self.args)
            self.teacher.check(self._stage_trainer(None, 0))
        else:
            self.teacher = None

    def _saved(self) -> list[SavedStage]:
        """What an earlier pass left, the dense model first; empty where there is nothing.

        Raises:
            ValueError: if nothing is ever written, or that pass had other settings.
        """
        if self.files.folder is None:
            raise ValueError(
                "resume_from_checkpoint: the pass leaves nothing to go on from with "
                "save_strategy='no'; set save_strategy='steps' or 'epoch' from the first run on"
            )
        saved = self.files.stages()
        if not saved:
            logger.warning(f"nothing to go on from in {self.files.folder}; the pass begins anew")
            return []
        require_same_settings(saved[-1].content["asked"], self._asked(), self.files.folder)
        return saved

    def _go_back(self, saved: list[SavedStage]) -> int:
        """The model, teacher and records as they were after the newest finished stage."""
        remove_quant_noise(self.model)
        load_in_memory_tensors(self.model, saved[0].tensors())
        newest = saved[-1]
        config = QuantizedModelConfig.from_dict(newest.content["config"])
        self.packer = ModelPacker(self.model, config, on_all_ranks=True)
        self._make_teacher()
        for content in newest.content["history"]:
            record = StageRecord(**content)
            self.trainer.state.global_step = record.step
            log_errors(self.trainer, record.layer_errors, self._number_of(record))
            self._add(record)
        self._restructure(record=newest.number == 0)
        if newest.number > 0:
            for stage in self.stages[: newest.number]:
                if stage in self.packer.stages:
                    self.packer.restore_stage(stage)
            load_in_memory_tensors(self.model, newest.tensors())
            self._optimizer_state = newest.optimizer()
        return newest.number

    # ---- a stage --------------------------------------------------------------------------------

    def _stage(self, number: int, stage: str | None) -> None:
        start = time.perf_counter()
        data = ()
        if self.config.weighs_errors:
            data = _calibration(self._stage_trainer(None, 0), self.model)
        packed = self.packer.pack_stage(stage, self._bars, *data)
        log_errors(self.trainer, packed.errors, number)
        noise = self._noise_on_waiting(stage)
        stage_trainer = self._stage_trainer(stage, number, noise)
        _calibrate(stage_trainer, self.model, packed)
        finetuning = packed_metric = {}
        if self.args.of_stage(stage).trains:
            packed_metric = evaluate_packed(stage_trainer)
            checkpoint = self.files.checkpoint(number)
            if noise is not None:
                apply_quant_noise(self.model, noise)
            finetuning = stage_trainer.train(resume_from_checkpoint=checkpoint).metrics
            remove_quant_noise(self.model).eval()
            if self.args.stage_schedule == "continue":
                self._optimizer_state = stage_trainer.optimizer_state()
        name = stage or "all"
        self._add(measure_stage(name, stage_trainer, start, packed, finetuning, packed_metric))
        self._save(number)

    def _noise_on_waiting(self, stage: str | None) -> QuantNoiseConfig | None:
        later = self.stages[self.stages.index(stage) + 1 :]
        waiting = [name for one in later for name in self.packer.layers_of(one)]
        return self.noise.on(waiting)

    def _add(self, record: StageRecord) -> None:
        undo_accelerate_prepare(
            self.model
        )  # by its evaluation: what comes next goes by the model alone
        record.step = self.trainer.state.global_step
        clean = (self.history or [record])[0].metric
        log_record(self.trainer, record, self._number_of(record), clean)
        self.history.append(record)
        self.report(record)

    def _number_of(self, record: StageRecord) -> int:
        """The number of a stage; 0 for what comes before the first."""
        names = [stage or "all" for stage in self.stages]
        return names.index(record.stage) + 1 if record.stage in names else 0

    def _asked(self) -> Fingerprint:
        return settings_fingerprint(
            self.trainer, self.config, self.args, self.noise_config, self.given_teacher
        )

    def _save(self, number: int) -> None:
        content = {
            "asked": self._asked(),
            "config": self.packer.config.to_dict(),
            "history": [record.to_dict() for record in self.history],
        }
        self.files.save_stage(number, self.model, content, self._optimizer_state)
        self.trainer.accelerator.wait_for_everyone()

    def _stage_trainer(
        self, stage: str | None, number: int, noise: QuantNoiseConfig | None = None
    ) -> StageTrainer:
        trainer, settings = self.trainer, self.args.of_stage(stage)
        stage_trainer = StageTrainer(
            self.model,
            self._stage_arguments(settings, number),
            compression_args=replace(
                self.args, codebook_learning_rate=settings.codebook_learning_rate
            ),
            teacher=self.teacher if number > 0 else None,
            noise=noise,
            span=self._span(number),
            optimizer_state=self._optimizer_state,
            data_collator=trainer.data_collator,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
            processing_class=trainer.processing_class,
            optimizer_cls_and_kwargs=self._optimizer_class(settings),
            compute_loss_func=trainer.compute_loss_func,
            compute_metrics=trainer.compute_metrics,
            preprocess_logits_for_metrics=trainer.preprocess_logits_for_metrics,
        )
        forward_logs(stage_trainer, trainer, number)
        return stage_trainer

    def _optimizer_class(self, settings: StageSettings) -> tuple[type, dict[str, Any]] | None:
        """What the trainer was given, with the stage's learning rate where it has one."""
        if self.trainer.optimizer_cls_and_kwargs is None:
            return None
        optimizer_class, given = self.trainer.optimizer_cls_and_kwargs
        rate = settings.learning_rate
        return optimizer_class, {**given, **({} if rate is None else {"lr": rate})}

    def _span(self, number: int) -> tuple[float, float]:
        """The part of the learning-rate schedule that a stage has."""
        if self.args.stage_schedule == "restart" or number == 0:
            return 0.0, 1.0
        settings = [self.args.of_stage(stage) for stage in self.stages]
        lengths = [each.epochs if each.steps is None else each.steps for each in settings]
        before, whole = sum(lengths[: number - 1]), sum(lengths)
        return (before / whole, (before + lengths[number - 1]) / whole) if whole else (0.0, 1.0)

    def _stage_arguments(self, settings: StageSettings, number: int) -> TrainingArguments:
        """The run's own arguments with the stage's length and learning rate."""
        args = self.trainer.args
        stage = copy.copy(args)
        steps = -1 if settings.steps is None else settings.steps
        if steps <= 0 and not has_length(self.trainer.train_dataset):
            steps = 1  # nothing is trained, but Trainer wants a number for streamed data
        changes = {
            "num_train_epochs": settings.epochs,
            "max_steps": steps,
            "eval_strategy": IntervalStrategy.NO,
            "load_best_model_at_end": False,
            "push_to_hub": False,
            "report_to": [],  # the run's own trainer shows what is logged
            "seed": args.seed + number,
        }
        if self.args.stage_schedule == "restart":
            changes["warmup_steps"] = 0
        if settings.learning_rate is not None:
            changes["learning_rate"] = settings.learning_rate
        if self.files.folder is not None:
            changes["output_dir"] = self.files.run_folder(number)
            changes["save_only_model"] = False
            # One may be torn when the pass is killed.
            changes["save_total_limit"] = max(2, args.save_total_limit or 2)
            if args.save_strategy == SaveStrategy.BEST:
                changes["save_strategy"] = SaveStrategy.EPOCH
        for name, value in changes.items():
            setattr(stage, name, value)
        return stage


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
