"""The compression run: pack a stage, finetune the centroids and what is still dense, evaluate.

Each stage has its own trainer: the optimizer, scheduler and wrapped model of a running one do not
know parameters that are created later. With ``save_strategy`` it is resumable (``checkpoints.py``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..batch_norm import bn_stats_of_packed_weights
from ..compat import undo_accelerate_prepare
from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from ..lookups import with_number_of_rows
from ..modeling.packer import ModelPacker
from ..modeling.plan import stages_for
from ..modeling.rollback import ModelSnapshot
from ..noise import apply_quant_noise, noised_layers, remove_quant_noise
from .arguments import CompressionArguments
from .bit_allocation.allocate import resolve_target
from .calibration import (
    calibrate_stage,
    check_before_stages,
    importance_data,
    lookups_in_training,
    training_batches,
    training_statistics,
)
from .checkpoints import FOLDER, SavedStage, StageCheckpoints
from .distillation.teacher import Teacher
from .fingerprint import Fingerprint, require_same_settings, settings_fingerprint
from .fitted_noise import fitted_noise, name_of_uncompressed
from .oneshot import remove_noise
from .preflight import check_compression, warn_of_latent_teacher
from .reporting.console import is_quiet, no_file_bars, shows_progress
from .reporting.logs import forward_logs, log_errors, log_record
from .reporting.record import CompressionHistory, StageRecord, evaluate_packed, measure_stage
from .training.fsdp import share_what_rank_0_read
from .training.pending_noise import noise_to_keep, pending_noise
from .training.stage_arguments import stage_optimizer, stage_training_arguments
from .training.stage_trainer import StageTrainer

logger = logging.get_logger(__name__)


class CompressionPipeline:
    """Compresses the model of a trainer, stage by stage.

    Args:
        trainer: provides the model, data, metrics and training arguments.
        config: how to store the model; its ``stages`` are carried out in order.
        compression_args: how to finetune between stages.
        teacher: model to distill from; None uses a frozen copy of the model.
        report: called with the record of the dense model, then of each finished stage.

    Attributes:
        history: the records so far, as dicts.

    Raises:
        ValueError: if the settings cannot be carried out; see ``preflight.py``.
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
        self.args = CompressionArguments() if compression_args is None else compression_args
        check_compression(trainer, config, self.args, teacher)
        self.given_teacher, self.report = teacher, report
        self.teacher: Teacher | None = None
        self.history = CompressionHistory()
        self.noise_config = noise_to_keep(trainer, self.args.keep_noise)
        self.model: PreTrainedModel = undo_accelerate_prepare(
            trainer.accelerator.unwrap_model(trainer.model)
        )
        self.stages = stages_for(config, self.model)
        if trainer.is_fsdp_enabled:  # otherwise Trainer has moved it
            self.model.to(trainer.args.device)
        writes = trainer.args.save_strategy != SaveStrategy.NO
        folder = os.path.join(trainer.args.output_dir, FOLDER) if writes else None
        self.files = StageCheckpoints(folder, trainer.args.should_save)
        self._progress = shows_progress(trainer)

    def run(self, resume: bool = False) -> PreTrainedModel:
        """Compress the model in place.

        Args:
            resume: continue from the files of an interrupted run with the same settings; start from
                scratch if there are none.

        Returns:
            The packed model.

        If a stage cannot be packed, or is interrupted while it is, the model is restored to what it
        was before: for the first stage the dense model with its noise, for a later one the result
        of the stage before. Nothing undoes the training of a stage.
        """
        self._before = ModelSnapshot(self.model)
        with self._before, no_file_bars():
            return self._run(resume)

    def _run(self, resume: bool) -> PreTrainedModel:
        saved = self._saved_stages() if resume else []
        if not saved:
            self.files.clear()
        self.trainer.accelerator.wait_for_everyone()
        n_done = self._restore(saved) if saved else self._start()
        for number, stage in enumerate(self.stages[n_done:], n_done + 1):
            if stage in self.packer.stages:  # layer_quantizers may keep all of it dense
                self._run_stage(number, stage)
        return self.model.eval()

    # ---- before the first stage -----------------------------------------------------------------

    def _start(self) -> int:
        """Evaluate and save the dense model, and prepare the first stage."""
        fitted, name = fitted_noise(self.model), name_of_uncompressed(self.model)
        lookups = lookups_in_training(self.trainer, self.model, self.config, self.args)
        config = with_number_of_rows(remove_noise(self.model, self.config), lookups)
        batches = training_batches(self.trainer, self.args.budget_batches)
        shown = self._progress, not is_quiet(self.trainer.args)  # bars, table
        config = resolve_target(self.model, config, batches, *shown, lookups)
        self.packer = ModelPacker(self.model, config, True, fitted=fitted, lookups=lookups)
        self.evaluator = self._make_trainer(None, 0)
        check_before_stages(self.evaluator, self.packer, self.args.calibration_batches)
        self._evaluate(name, self.evaluator, time.perf_counter())
        self._save(0)
        self._make_teacher()
        self._restructure()
        return 0

    def _saved_stages(self) -> list[SavedStage]:
        """Return the saved stages of an interrupted run, the dense model first.

        Raise a ``ValueError`` if no files are ever written, or that run had other settings.
        """
        if self.files.folder is None:
            raise ValueError(
                "cannot resume with save_strategy='no': no checkpoints are written; set "
                "save_strategy='steps' or 'epoch' from the first run on"
            )
        saved = self.files.stages()
        if not saved:
            logger.warning(f"nothing to resume in {self.files.folder}: starting from scratch")
            return []
        require_same_settings(saved[-1].content["asked"], self._fingerprint(), self.files.folder)
        return saved

    def _restore(self, saved: list[SavedStage]) -> int:
        """Restore model, teacher and records as they were after the newest finished stage."""
        remove_quant_noise(self.model)
        saved[0].load_into(self.model)
        newest = saved[-1]
        config = QuantizedModelConfig.from_dict(newest.content["config"])
        fitted = saved[0].fitted_noise(self.model)
        self.packer = ModelPacker(self.model, config, True, fitted, saved[0].lookups())
        for content in newest.content["history"]:
            record = StageRecord(**content)
            # At the step at which the stage was packed: that of the record before.
            log_errors(self.trainer, record.layer_errors, self._number_of(record.stage))
            self.trainer.state.global_step = record.step
            self._add_record(record)
        self.evaluator = self._make_trainer(None, 0)
        self._make_teacher()
        self._restructure(record=newest.number == 0)
        if newest.number > 0:
            self.packer.restore_stages(self.stages[: newest.number], config.plan)
            self.packer.config.left_dense = config.left_dense
            newest.load_into(self.model)
        return newest.number

    def _make_teacher(self) -> None:
        if self.args.distill and self.args.trains(self.stages):
            if self.given_teacher is not None:
                share_what_rank_0_read(self.trainer, self.given_teacher)
            else:
                warn_of_latent_teacher(self.history[0]["stage"])
            self.teacher = Teacher(self.model, self.given_teacher, self.args)
            self.teacher.check(self.evaluator)

    def _restructure(self, record: bool = True) -> None:
        start = time.perf_counter()
        self.packer.change_structure()
        self.noised = noised_layers(self.model, self.noise_config) if self.noise_config else []
        if self.packer.structural_changes and record:
            self._evaluate("restructured", self.evaluator, start)

    # ---- a stage --------------------------------------------------------------------------------

    def _run_stage(self, number: int, stage: str | None) -> None:
        start = time.perf_counter()
        pending = [name for later in self.stages[number:] for name in self.packer.layers_of(later)]
        noise = pending_noise(self.noise_config, self.noised, pending)
        statistics = training_statistics(self.evaluator, self.args.batch_norm_batches)
        with ModelSnapshot(self.model):
            data = importance_data(self.evaluator, self.packer, self.args.calibration_batches)
            self.packer.check_weights(stage)  # training has changed them
            with bn_stats_of_packed_weights(self.model, statistics.measure):
                packed = self.packer.pack_stage(stage, self._progress, *data)
            stage_trainer = self._make_trainer(stage, number, noise)
            calibrate_stage(stage_trainer, self.packer, packed, self.args.calibration_batches)
        self._before.release()  # training changes the tensors that it holds
        log_errors(self.trainer, packed.errors, number)
        finetuning = packed_metric = {}
        if self.args.settings_of(stage).trains:
            packed_metric = evaluate_packed(stage_trainer)
            if noise is not None:
                apply_quant_noise(self.model, noise, self.packer.lookups)
            finetuning = stage_trainer.train(self.files.checkpoint(number)).metrics
            remove_quant_noise(self.model).eval()
            statistics.update()
            self.packer.config.weights_id = None  # a checkpoint's, which training has left behind
        if stage == self.packer.last_stage:
            with ModelSnapshot(self.model):
                with bn_stats_of_packed_weights(self.model, statistics.measure):
                    self.packer.pack_leftovers()
                self.packer.round_leftovers()
        self._evaluate(_name(stage), stage_trainer, start, packed, finetuning, packed_metric)
        self._save(number)

    # ---- records and files ----------------------------------------------------------------------

    def _evaluate(self, name: str, trainer: StageTrainer, start: float, *results: Any) -> None:
        """Record the results of a stage; see :func:`measure_stage`."""
        record = measure_stage(name, trainer, start, *results)
        undo_accelerate_prepare(self.model)  # the evaluation has prepared it
        trainer.accelerator.free_memory()
        self._add_record(record)

    def _add_record(self, record: StageRecord) -> None:
        record.step = self.trainer.state.global_step
        self.history.append(record.to_dict())
        log_record(self.trainer, record, self._number_of(record.stage), self.history[0])
        if self.report is not None:
            self.report(record)

    def _number_of(self, name: str) -> int:
        """Return the number of a stage, counted from 1; 0 for the records before the first."""
        names = [_name(stage) for stage in self.stages]
        return names.index(name) + 1 if name in names else 0

    def _fingerprint(self) -> Fingerprint:
        return settings_fingerprint(
            self.trainer, self.config, self.args, self.noise_config, self.given_teacher
        )

    def _save(self, number: int) -> None:
        content = {
            "asked": self._fingerprint(),
            "config": self.packer.config.to_dict(),
            "history": self.history,
        }
        self.files.save_stage(number, self.model, content, self.packer.fitted, self.packer.lookups)
        self.trainer.accelerator.wait_for_everyone()

    # ---- the trainer of a stage -----------------------------------------------------------------

    def _make_trainer(
        self, stage: str | None, number: int, noise: QuantNoiseConfig | None = None
    ) -> StageTrainer:
        """Return the trainer of a stage; that of number 0 evaluates and reads data."""
        trainer, settings = self.trainer, self.args.settings_of(stage)
        args = replace(self.args, codebook_learning_rate=settings.codebook_learning_rate)
        output_dir = None if self.files.folder is None else self.files.run_folder(number)
        stage_trainer = StageTrainer(
            self.model,
            stage_training_arguments(trainer, settings, number, output_dir),
            compression_args=args,
            teacher=self.teacher,
            noise=noise,
            data_collator=trainer.data_collator,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
            processing_class=trainer.processing_class,
            optimizer_cls_and_kwargs=stage_optimizer(trainer, settings),
            compute_loss_func=trainer.compute_loss_func,
            compute_metrics=trainer.compute_metrics,
            preprocess_logits_for_metrics=trainer.preprocess_logits_for_metrics,
        )
        title = f"{_name(stage)} ({number}/{len(self.stages)})" if number else "before compression"
        forward_logs(stage_trainer, trainer, number, title)
        return stage_trainer


def _name(stage: str | None) -> str:
    return "all" if stage is None else stage
