"""``QuantNoiseCallback``: noise training in this package's trainer or any other."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .argument_checks import require_instance, require_model
from .configuration import NOISE_CONFIG_NAME, QuantNoiseConfig
from .distributed import average_gradients, require_one_gpu_per_process
from .lookups import Lookups
from .noise import QuantNoiseState, apply_quant_noise, find_state
from .training_statistics import TrainingStatistics

logger = logging.getLogger(__name__)

STATE_NAME = "quant_noise_state.safetensors"

# After this many steps, warn about layers that never received noise. With LayerDrop or experts a
# layer may be idle for a few.
REACH_STEPS = 8


class QuantNoiseCallback(TrainerCallback):
    """Applies noise when training begins, and refreshes its codebooks and scales in training.

    Works with any ``Trainer``, e.g. those of TRL or sentence-transformers:
    ``trainer.add_callback(QuantNoiseCallback(config))``. Checkpoints contain the config and the
    codebooks next to the weights, so that training resumes with the same noise.

    Args:
        config: which noise to apply; see :class:`QuantNoiseConfig`.
        lookups: :func:`count_lookups`, if ``config.frequent_rows`` is set.

    Attributes:
        resume_folder: checkpoint from which the noise is restored when training begins. None: the
            checkpoint in ``output_dir`` of the step that training resumes from.

    Raises:
        TypeError: if ``config`` is not a :class:`QuantNoiseConfig`.
    """

    def __init__(self, config: QuantNoiseConfig, lookups: Lookups | None = None) -> None:
        require_instance(
            "config", config, QuantNoiseConfig, "a QuantNoiseConfig",
            "pass e.g. QuantNoiseConfig(noise='proxy', p=0.1)",
        )  # fmt: skip
        self.config = config
        self.lookups = lookups
        self.resume_folder: str | os.PathLike | None = None
        self._is_restored = False
        self._is_saved = False  # in the checkpoint that is being written
        self._is_first_epoch = True  # of a call of train()
        self._statistics: TrainingStatistics | None = None
        self._measured_step = -1

    def prepare(self, model: nn.Module) -> None:
        """Apply the noise, unless the model already has noise."""
        require_model(model, nn.Module)
        if find_state(model) is None:
            apply_quant_noise(model, self.config, self.lookups)

    def save(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Write the config and the fitted codebooks and scales to a checkpoint folder."""
        state = find_state(model)
        if state is None or not os.path.isdir(folder):
            return
        tensors = {name: tensor.contiguous() for name, tensor in state.state_dict().items()}
        if tensors:
            save_file(tensors, os.path.join(folder, STATE_NAME))
        state.config.save_pretrained(folder)  # last, since load() checks for it

    def save_early(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Write the noise to a checkpoint that is still being written, instead of after it.

        ``Trainer`` completes a checkpoint before it calls :meth:`on_save`, so a process that is
        killed between the two leaves a complete one without noise; and :meth:`on_save` does not
        know the folders of a hyperparameter search.
        """
        self._is_saved = os.path.isdir(folder)
        self.save(model, folder)

    def checkpoint_files(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the files without which the noise would have to be fitted again."""
        state = find_state(model)
        return (STATE_NAME, NOISE_CONFIG_NAME) if state is not None and state.state_dict() else ()

    def load(self, model: nn.Module, folder: str | os.PathLike) -> None:
        """Read the files of :meth:`save`; without them, the model's noise is left unchanged.

        Raises:
            ValueError: if the checkpoint was trained with other noise.
        """
        state = find_state(model)
        if state is None or not os.path.isfile(os.path.join(folder, NOISE_CONFIG_NAME)):
            return
        stored = QuantNoiseConfig.from_pretrained(folder)
        if stored != state.config:
            folder = os.fspath(folder)
            raise ValueError(
                f"cannot resume from {folder!r}: it was trained with another QuantNoiseConfig "
                f"(noise={stored.noise!r}) than this run's (noise={state.config.noise!r}); use "
                f"QuantNoiseConfig.from_pretrained({folder!r})"
            )
        path = os.path.join(folder, STATE_NAME)
        if os.path.isfile(path):
            state.load_state_dict(load_file(path))
        names = self.checkpoint_files(model)
        self._is_restored = all(os.path.isfile(os.path.join(folder, name)) for name in names)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Apply the noise; in a resumed run, restore the checkpoint's codebooks.

        Noise that was trained with before is fitted to the weights that the model has now.

        Raises:
            ValueError: if ``share_layers`` is set and the optimizer already holds the separate
                weights, centroids are to be trained on several GPUs of one process or the
                optimizer lacks them, or the model has BatchNorm and cannot run a training batch by
                itself.
        """
        model = kwargs["model"]
        if self.config.share_layers != 1 and find_state(model) is None:
            raise ValueError(
                f"share_layers={self.config.share_layers!r} cannot be applied once the optimizer "
                "holds the weights of every layer; call QuantNoiseCallback.prepare(model) before "
                "creating the trainer"
            )
        self.prepare(model)
        noise = find_state(model)
        _require_trained_centroids(noise, args.n_gpu, kwargs.get("optimizer"))
        _clear_gradients(noise)  # of a step that was interrupted, or ran out of memory
        self._is_first_epoch = True
        if state.global_step > 0:
            self._restore(model, args, state)
        elif noise is not None and noise.used:
            noise.refresh_codebooks()
            noise.refresh_scales()
        self.resume_folder, self._is_restored = None, False  # for a later call of train()
        self._statistics = TrainingStatistics(
            args, model, kwargs.get("train_dataloader"), self.config.batch_norm_batches
        )
        self._statistics.check()
        self._measured_step = -1

    def _restore(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        """Load the noise of the checkpoint that training resumes from.

        If the checkpoint has none, the noise stays as it was fitted when it was applied: after a
        kill between the first checkpoint and its noise, this is the state of the run.
        """
        if self._is_restored:  # by a call to load()
            return
        folder = self.resume_folder or checkpoint_folder(args, state)
        self.load(model, folder)
        noise = find_state(model)
        if not self._is_restored and noise is not None and noise.state_dict():
            logger.warning(
                "resumed at step %d, but %s has no quantization noise: training continues with new "
                "codebooks and scales. If the checkpoint is elsewhere, call "
                "callback.prepare(model) and callback.load(model, folder) before train()",
                state.global_step,
                folder,
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refresh the codebooks once per epoch (section 4.2)."""
        noise = find_state(kwargs["model"])
        is_new_epoch = state.global_step > 0
        if self._is_first_epoch:
            # A run resumed within an epoch has the codebooks of its beginning already.
            is_new_epoch = is_new_epoch and math.isclose(state.epoch, round(state.epoch))
        self._is_first_epoch = False
        if noise is not None and is_new_epoch and self.config.codebook_interval == "epoch":
            noise.refresh_codebooks()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rates by their schedule; refresh the codebooks and scales that are due."""
        noise, step = find_state(kwargs["model"]), state.global_step
        if noise is None:
            return
        if self.config.p_schedule != "constant":
            noise.p = self.config.p_at(step)
        if step == 0:
            return
        every = self.config.codebook_interval
        if every != "epoch" and step % int(every) == 0:
            noise.refresh_codebooks()
        if step % self.config.scale_update_steps == 0:
            noise.refresh_scales()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the gradients of trained centroids over ranks; DDP does so for the model only."""
        if (noise := find_state(kwargs["model"])) is not None:
            average_gradients(noise.parameters())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clear the gradients of trained centroids: ``Trainer`` clears those of the model."""
        _clear_gradients(find_state(kwargs["model"]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Exchange observed ranges, warn about layers without noise, measure BatchNorm statistics.

        The warning is logged once. The statistics are measured before an evaluation or a
        checkpoint.
        """
        noise = find_state(kwargs["model"])
        if noise is None:
            return
        noise.share_ranges()
        if state.global_step == REACH_STEPS:
            noise.note_unreached()
        if control.should_evaluate or control.should_save:
            self._update_statistics(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the statistics of BatchNorm before an evaluation or a checkpoint."""
        if control.should_evaluate or control.should_save:
            self._update_statistics(state)

    def _update_statistics(self, state: TrainerState) -> None:
        if self._statistics is not None and state.global_step != self._measured_step:
            self._measured_step = state.global_step
            self._statistics.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn about layers without noise, and measure the statistics of BatchNorm.

        With ``load_best_model_at_end``, load the codebooks and scales of the best model.
        """
        if (noise := find_state(kwargs["model"])) is not None:
            noise.note_unreached()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(kwargs["model"], state.best_model_checkpoint)
            self._is_restored = False  # a later call of train() may resume from another one
        self._update_statistics(state)
        self._statistics = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the noise to the checkpoint that was just saved, if it has none yet."""
        if args.should_save and not self._is_saved:  # on each machine, with save_on_each_node
            self.save(kwargs["model"], checkpoint_folder(args, state))
        self._is_saved = False


def _require_trained_centroids(
    noise: QuantNoiseState | None, n_gpu: int, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise if centroids are to be trained, and cannot be, or the optimizer does not have them."""
    if noise is None or not (centroids := noise.parameters()):
        return
    require_one_gpu_per_process(n_gpu, "learn_codebooks=True")  # replicas share the centroids
    if optimizer is None:
        return
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if any(id(each) not in trained for each in centroids):
        raise ValueError(
            "learn_codebooks=True, and the optimizer does not have the centroids; use "
            "QuantNoiseTrainer without optimizers, or call QuantNoiseCallback.prepare(model) and "
            "add find_state(model).parameters() to the optimizer"
        )


def _clear_gradients(noise: QuantNoiseState | None) -> None:
    for centroids in noise.parameters() if noise is not None else ():
        centroids.grad = None


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> str:
    """Return the folder of the checkpoint of the current step."""
    return os.path.join(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
