"""``QuantNoiseTrainer``: trains with noise, then compresses and publishes the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .argument_checks import describe, require_dataset
from .callback import QuantNoiseCallback
from .compression import CompressionArguments, CompressionPipeline
from .compression.calibration import lookups_in_training
from .compression.checkpoints import FOLDER
from .compression.reporting.console import is_quiet, silence_if_quiet
from .compression.reporting.plots import PLOTS, plot_compression
from .compression.reporting.record import CompressionHistory, StageRecord
from .compression.trainer_checkpoints import checkpoint_to_resume_from
from .compression.training.distilling_trainer import DistillingTrainer, make_teacher
from .configuration import QuantizedModelConfig, QuantNoiseConfig
from .configuration.checks import boolean
from .files.model_folders import UNPUBLISHED
from .hub.processing import remember_processing
from .metric_modules import as_compute_metrics
from .noise import find_state
from .publishing.trainer_mixin import PublishingMixin
from .size import size_report
from .trainer_arguments import check_arguments, require_ddp_for_centroids, warn_of_adapters

if TYPE_CHECKING:
    from evaluate import EvaluationModule
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset, IterableDataset
    from transformers import (
        BaseImageProcessor,
        DataCollator,
        EvalPrediction,
        FeatureExtractionMixin,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

    ProcessingClass = (
        PreTrainedTokenizerBase | BaseImageProcessor | FeatureExtractionMixin | ProcessorMixin
    )
    Metrics: TypeAlias = (
        Callable[[EvalPrediction], dict[str, float]] | EvaluationModule | str | os.PathLike[str]
    )


class QuantNoiseTrainer(PublishingMixin, DistillingTrainer):
    """Finetunes a model with quantization noise, compresses it and publishes it.

    Args:
        model: a transformers model.
        args: ``TrainingArguments``.
        qn_config: which noise to train with; None trains without noise.
        teacher: a model to distill from, in :meth:`train` and in :meth:`compress`. It is put in
            eval mode and not trained. None: :meth:`train` uses only the labels, and
            :meth:`compress` a frozen copy of the uncompressed model as teacher.
        compression_args: how to distill, and the learning rate of centroids that the noise trains;
            also the default of :meth:`compress`.
        data_collator, train_dataset, eval_dataset, processing_class, model_init,
            compute_loss_func, callbacks, optimizers, optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics: as in ``Trainer``.
        compute_metrics: as in ``Trainer``; for models with one label per example also a metric of
            the package evaluate (``evaluate.load("accuracy")``), or its name or path.

    Attributes:
        compression_history: after :meth:`compress`, one dict for the dense model and one per stage;
            see :class:`~hf_quantnoise.compression.StageRecord`. A list with ``to_pandas()``.

    Raises:
        TypeError: if ``model``, ``args``, ``qn_config``, ``teacher``, ``compression_args`` or
            ``compute_metrics`` has another type.
        ValueError: if there is a teacher and ``compression_args`` has ``distill=False``, the
            noise trains centroids under FSDP, or ``args`` has ``predict_with_generate``.

    Example:
        >>> trainer = QuantNoiseTrainer(model, args, QuantNoiseConfig(noise="proxy", p=0.1), ...)
        >>> trainer.train()
        >>> small = trainer.compress(IPQConfig(block_size=4))
        >>> small.save_pretrained("out")
    """

    unpublished = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{FOLDER}/*", *UNPUBLISHED)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        qn_config: QuantNoiseConfig | None = None,
        *,
        teacher: nn.Module | None = None,
        compression_args: CompressionArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessingClass | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Metrics | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        check_arguments(model, args, qn_config, model_init)
        require_dataset("train_dataset", train_dataset)
        require_dataset("eval_dataset", eval_dataset)
        self.qn_config: QuantNoiseConfig | None = None  # until the trainer exists
        self.noise_callback: QuantNoiseCallback | None = None
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=as_compute_metrics(compute_metrics),
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            **_unless_none(optimizer_cls_and_kwargs=optimizer_cls_and_kwargs),
        )
        silence_if_quiet(self)
        self.qn_config = qn_config
        self.compression_args = (
            CompressionArguments() if compression_args is None else compression_args
        )
        self.given_teacher = teacher
        self.set_teacher(make_teacher(self, teacher, self.compression_args))
        self.compression_history = CompressionHistory()
        self._add_noise(self.model)
        warn_of_adapters(self.model)

    def _add_noise(self, model: nn.Module) -> None:
        if self.qn_config is None:
            return
        require_ddp_for_centroids(self, self.qn_config)
        if self.noise_callback is None:
            self.noise_callback = QuantNoiseCallback(self.qn_config)
            self.add_callback(self.noise_callback)
        args = self.compression_args
        self.noise_callback.lookups = lookups_in_training(self, model, self.qn_config, args)
        self.noise_callback.prepare(model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """``Trainer.call_model_init``; the new model of each ``train`` has noise, too."""
        model = super().call_model_init(trial)
        self._add_noise(model)  # before the optimizer holds weights that layers have to share
        return model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """``Trainer.train``; ``resume_from_checkpoint=True`` uses the newest complete checkpoint.

        Incomplete checkpoints, as after a killed run, are skipped with a warning.

        Raises:
            ValueError: if there are checkpoints, but none is complete.
        """
        if resume_from_checkpoint is True:
            callback = self.noise_callback
            noise_files: tuple[str, ...] = ()
            if callback is not None and self.model is not None:
                noise_files = callback.checkpoint_files(self.model)
            checkpoint = checkpoint_to_resume_from(str(self.args.output_dir), noise_files)
            resume_from_checkpoint = checkpoint or True  # without any, Trainer raises
        if self.noise_callback is not None and isinstance(
            resume_from_checkpoint, str | os.PathLike
        ):
            self.noise_callback.resume_folder = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """``Trainer.create_optimizer``, with the centroids that the noise trains."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        state = find_state(self.model)
        if is_new and state is not None and (centroids := state.parameters()):
            rate = self.compression_args.codebook_learning_rate
            group = {"params": centroids, "weight_decay": 0.0}
            optimizer.add_param_group(group if rate is None else {**group, "lr": rate})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as ``Trainer`` does; a checkpoint contains the noise, too."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None or not self.args.should_save:
            return
        if self.noise_callback is not None:
            self.noise_callback.save_early(self.model, output_dir)

    def compress(
        self,
        config: QuantizedModelConfig,
        compression_args: CompressionArguments | None = None,
        teacher: nn.Module | None = None,
        report: Callable[[StageRecord], None] | None = None,
        resume_from_checkpoint: bool = False,
    ) -> PreTrainedModel:
        """Compress the model in place, stage by stage (iPQ, section 3.2).

        The noise is removed first. Each stage quantizes its layers, then finetunes the centroids
        and everything that is still dense, with the uncompressed model as teacher. All metrics and
        quantization errors are logged.

        Args:
            config: :class:`IPQConfig` or :class:`FixedPointConfig`.
            compression_args: how to finetune; None uses those of the trainer (by default one epoch
                per stage, with a teacher).
            teacher: another model to distill from; None uses that of the trainer.
            report: called with the record of each finished stage, on every process.
            resume_from_checkpoint: resume an interrupted ``compress`` that had the same settings;
                the result is the same as without the interruption. Without files of such a run, it
                starts from scratch. Needs a ``save_strategy`` other than ``"no"``.

        Returns:
            The packed model, which is also ``self.model``.

        Raises:
            TypeError: if an argument has another type.
            ValueError: before anything is changed, if the settings are invalid for this model,
                data or trainer.
        """
        compression_args = self.compression_args if compression_args is None else compression_args
        teacher = self.given_teacher if teacher is None else teacher
        boolean("resume_from_checkpoint", resume_from_checkpoint)
        if report is not None and not callable(report):
            raise TypeError(f"invalid report: got {describe(report)}, expected a function or None")

        def report_stage(record: StageRecord) -> None:
            if self.is_world_process_zero() and not is_quiet(self.args):
                tqdm.write(record.line())
            if report is not None:
                report(record)

        pipeline = CompressionPipeline(self, config, compression_args, teacher, report_stage)
        self.compression_history = pipeline.history
        self._set_card_metrics({})
        model = pipeline.run(resume_from_checkpoint)
        self._use_packed_model(model)
        self.compression_args = compression_args
        self._plots = []
        if compression_args.plots and self.args.should_save:
            folder = os.path.join(str(self.args.output_dir), PLOTS)
            self._plots = plot_compression(self.compression_history, size_report(model), folder)
        self._set_card_metrics(self.compression_history[-1]["metric"])
        return model

    def _use_packed_model(self, model: PreTrainedModel) -> None:
        """Drop the optimizer, the wrapper and the noise, which belong to the dense model."""
        if self.noise_callback is not None:
            self.remove_callback(self.noise_callback)
            self.noise_callback = None
        remember_processing(model, self.processing_to_save())
        self.model = self.model_wrapped = model
        self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the noise rates and the average share of noised weights for a training loss."""
        state = find_state(self.model) if self.noise_callback is not None else None
        if state is not None and "loss" in logs:
            logs = {**logs, **state.figures(self.model)}
        super().log(logs, start_time)


def _unless_none(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are set; other base classes, as Seq2SeqTrainer, may lack them."""
    return {name: value for name, value in arguments.items() if value is not None}
