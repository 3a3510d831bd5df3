"""``QuantNoiseTrainer``: a thin ``Trainer`` that trains with noise, then compresses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .callback import QuantNoiseCallback
from .compression import CompressionArguments, CompressionPipeline, PackedModelTrainer
from .compression.checkpoints import FOLDER
from .compression.reporting.plots import PLOTS, plot_compression
from .compression.reporting.record import StageRecord
from .compression.trainer_checkpoints import checkpoint_defect, checkpoint_to_resume_from
from .configuration import QuantizedModelConfig, QuantNoiseConfig
from .noise import find_state
from .publishing.trainer_mixin import PublishingMixin
from .size import size_report


class QuantNoiseTrainer(PublishingMixin, PackedModelTrainer):
    """Finetunes a model with quantization noise, compresses it and publishes it.

    Args:
        model: a transformers model.
        args: ``TrainingArguments``.
        qn_config: which noise to train with; None trains without any.
        kwargs: all that ``Trainer`` takes.

    Attributes:
        compression_history: after :meth:`compress`, one dict per stage (see
            :class:`~hf_quantnoise.compression.StageRecord`), the dense model's first.

    Raises:
        TypeError: if ``qn_config`` is something else.

    Example:
        >>> trainer = QuantNoiseTrainer(model, args, QuantNoiseConfig(noise="proxy", p=0.1), ...)
        >>> trainer.train()
        >>> small = trainer.compress(IPQConfig(block_size=4))
        >>> small.save_pretrained("out")
    """

    unpublished = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{FOLDER}/*")

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        qn_config: QuantNoiseConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if qn_config is not None and not isinstance(qn_config, QuantNoiseConfig):
            raise TypeError(
                f"qn_config is a {type(qn_config).__name__}; the third argument of "
                "QuantNoiseTrainer is a QuantNoiseConfig, e.g. QuantNoiseConfig(noise='proxy', "
                "p=0.1); pass data_collator and the rest by name"
            )
        super().__init__(model, args, **kwargs)
        self.qn_config = qn_config
        self.compression_history: list[dict[str, Any]] = []
        self.noise_callback: QuantNoiseCallback | None = None
        if qn_config is not None:
            self.noise_callback = QuantNoiseCallback(qn_config)
            self.noise_callback.prepare(self.model)
            self.add_callback(self.noise_callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in ``Trainer``, but ``resume_from_checkpoint=True`` takes the newest checkpoint that
        is whole; torn ones, which a kill leaves, are passed over with a warning.

        Raises:
            ValueError: if there are checkpoints and none of them is whole.
        """
        if resume_from_checkpoint is True:
            # None: that there is no checkpoint is for Trainer to say.
            resume_from_checkpoint = self._newest_whole_checkpoint() or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_whole_checkpoint(self) -> str | None:
        rules = [checkpoint_defect]
        if self.noise_callback is not None:
            # With its noise rather than without: codebooks are fitted anew then.
            rules.insert(
                0,
                lambda folder: (
                    checkpoint_defect(folder)
                    or self.noise_callback.missing_from(folder, self.model)
                ),
            )
        return checkpoint_to_resume_from(self.args.output_dir, *rules)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.noise_callback is not None:
            self.noise_callback.load(self.model if model is None else model, resume_from_checkpoint)

    def compress(
        self,
        config: QuantizedModelConfig,
        compression_args: CompressionArguments | None = None,
        teacher: nn.Module | None = None,
        report: Callable[[StageRecord], None] | None = None,
        resume_from_checkpoint: bool = False,
    ) -> PreTrainedModel:
        """Compresses the model stage by stage (iPQ, section 3.2), in place.

        The noise is removed; each stage quantizes its layers and finetunes centroids and all that
        is still dense, with the uncompressed model as teacher. Every figure is in the logs.

        Args:
            config: :class:`IPQConfig` or :class:`FixedPointConfig`.
            compression_args: how to finetune; the default is one epoch per stage with a teacher.
            teacher: another model to learn from.
            report: called with each stage's record as it comes, on every process.
            resume_from_checkpoint: go on where an earlier ``compress`` with the same settings was
                killed, and end with the same model; it begins where nothing was left. The pass
                writes as the trainer does, so not with ``save_strategy="no"``.

        Returns:
            The packed model, which is ``self.model`` too.

        Raises:
            ValueError: before anything is changed, where the config cannot be carried out.
        """
        _require_config(config)
        self.compression_history = []
        self._has_measured({})

        def keep(record: StageRecord) -> None:
            self.compression_history.append(record.to_dict())
            if self.is_world_process_zero():
                tqdm.write(record.line())
            if report is not None:
                report(record)

        compression_args = compression_args or CompressionArguments()
        staged = CompressionPipeline(self, config, compression_args, teacher, keep)
        model = staged.run(resume_from_checkpoint)
        if self.noise_callback is not None:
            self.remove_callback(self.noise_callback)  # a later train() finetunes the packed model
            self.noise_callback = None
        self._forget_dense_model(model)
        self.compression_args = compression_args
        self._has_measured(self.compression_history[-1]["metric"])
        if compression_args.plots and self.args.should_save:
            folder = os.path.join(self.args.output_dir, PLOTS)
            plot_compression(self.compression_history, size_report(model), folder)
        return model

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """``Trainer``'s log; beside a training loss it has the rates of the noise and the share of
        all weights that it replaces in a forward, on average."""
        state = find_state(self.model) if self.noise_callback is not None else None
        if state is not None and "loss" in logs:
            logs = {**logs, **state.figures(self.model)}
        super().log(logs, start_time)

    def _forget_dense_model(self, model: PreTrainedModel) -> None:
        """Drops the optimizer and wrapper of the dense model: their parameters are gone."""
        self.model = self.model_wrapped = model
        self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()


def _require_config(config: object) -> None:
    if not isinstance(config, QuantizedModelConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; compress takes an IPQConfig or a "
            "FixedPointConfig, e.g. compress(IPQConfig(block_size=4))"
        )
