"""A ``Trainer`` for packed models that also fixes cases which stock ``Trainer`` gets wrong."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

from ...compat import undo_accelerate_prepare, without_compile_wrapper
from ...modeling.packed import PREFIX
from .fsdp import ShardedCopy, require_fsdp2, share_what_rank_0_read
from .loss_normalization import loss_reads_num_items
from .precision import check_trained_dtypes


def _describe_bound_optimizer(trainer: Trainer) -> str | None:
    """Describe the user's optimizer if it holds parameters; for a trainer that has not trained."""
    pair = trainer.optimizer, trainer.lr_scheduler
    if any(each is not None for each in pair):
        names = ["None" if each is None else type(each).__name__ for each in pair]
        return f"optimizers=({', '.join(names)})"
    if trainer.optimizer_cls_and_kwargs is None:
        return None
    optimizer_class, kwargs = trainer.optimizer_cls_and_kwargs
    bound = [name for name in ("params", "model", "optimizer_dict") if name in kwargs]
    name = getattr(optimizer_class, "__name__", type(optimizer_class).__name__)
    return f"optimizer_cls_and_kwargs=({name}, {{{bound[0]!r}: ...}})" if bound else None


class PackedModelTrainer(Trainer):
    """``Trainer`` with these fixes.

    * Gradient accumulation does not multiply the loss of heads that compute a plain mean.
    * Centroids get no weight decay: it would pull them to zero, not regularize a weight.
    * A checkpoint of another structure (dense, or another stage) is refused. ``Trainer`` would load
      it with a warning and pass optimizer state of other shapes to a fused kernel.
    * A training resumed from its last checkpoint takes no step. ``Trainer`` takes one if the last
      step did not end an epoch. With streamed data it resumes at the right batch.
    * A model that was evaluated or trained before is trained with all processes, and compiled.
      accelerate (1.15) considers it prepared already and skips DDP and ``torch_compile``; then each
      rank silently trains alone.
    * Under FSDP2 a copy of the model is sharded (``fsdp.py``). After ``train`` the trainer has the
      original object again, with the new weights, on every rank, and no optimizer.

    Attributes:
        bound_optimizer: describes an optimizer given by the user that holds the parameters of the
            model passed in; None without one.

    Raises:
        ValueError: if the arguments ask for sharding that is not supported.
    """

    model: PreTrainedModel

    def __init__(self, *args, **kwargs) -> None:
        self._checkpoint: str | os.PathLike | None = None
        super().__init__(*args, **kwargs)
        self.bound_optimizer = _describe_bound_optimizer(self)
        require_fsdp2(self)
        share_what_rank_0_read(self, self.model)
        self._sharded: ShardedCopy | None = None
        if self.model_accepts_loss_kwargs and not loss_reads_num_items(self.model):
            self.model_accepts_loss_kwargs = False

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """``Trainer.call_model_init``, with the check of the checkpoint that is resumed."""
        model = super().call_model_init(trial)
        _require_same_layers(model, self._checkpoint)
        return model

    @property
    def unsharded_model(self) -> nn.Module:
        """The model; while FSDP2 trains a copy, the original with its previous weights."""
        return self.model if self._sharded is None else self._sharded.original

    def gather_model(self) -> nn.Module:
        """Return the unsharded model with the current weights. Under FSDP2, call on all ranks."""
        if self._sharded is not None:
            self._sharded.put_back()
        return self.unsharded_model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """``Trainer.train``, with the fixes of this class.

        Raises:
            ValueError: if the checkpoint has other packed layers than the model, or its weights
                are float16 and ``fp16`` is set.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        by_path = isinstance(resume_from_checkpoint, (str, os.PathLike))
        self._checkpoint = resume_from_checkpoint if by_path else None
        if self.model_init is not None:  # Trainer replaces the model, which may be None by now
            return super().train(resume_from_checkpoint, *args, **kwargs)
        check_trained_dtypes(self.model, self.args)
        _require_same_layers(self.model, self._checkpoint)
        if without_compile_wrapper(self.model_wrapped) is self.model:  # and not inside DDP
            self.model = self.model_wrapped = undo_accelerate_prepare(
                self.accelerator.unwrap_model(self.model)
            )
        if not self.is_fsdp_enabled:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self._sharded = ShardedCopy(self.model, self.args.device)
        self.model = self.model_wrapped = self._sharded.model
        with self._sharded.rules(self.accelerator):
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.model = self.model_wrapped = self.callback_handler.model = self.gather_model()
        self.optimizer = self.lr_scheduler = self._sharded = None
        self.accelerator.free_memory()
        return result

    # Private: the only place that decides which epochs and batches a resumed training skips.
    def _init_training_state(self, max_steps, epoch_steps, epochs, checkpoint, trial):
        trained = super()._init_training_state(max_steps, epoch_steps, epochs, checkpoint, trial)
        if checkpoint is None or self.state.global_step == 0:
            return trained
        if self.state.global_step >= max_steps:
            return epochs, 0
        # Without a length, Trainer counts all steps as one epoch, also in the state's epoch.
        if epoch_steps != max_steps or self.state.epoch < 1 or self.args.ignore_data_skip:
            return trained
        share, epochs = math.modf(self.state.epoch)
        return int(epochs), round(share * max_steps * self.args.gradient_accumulation_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """``Trainer.create_optimizer``; under FSDP2 with separate groups for replicated parameters.

        One optimizer call cannot take sharded and other parameters together.
        """
        optimizer = super().create_optimizer(model)
        if self._sharded is not None:
            self._sharded.split_groups(optimizer.param_groups)
        return optimizer

    # Private: the optimizer's state must be completed right after it was loaded.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._sharded is not None:
            self._sharded.spread_state(self.optimizer)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Run a micro-batch; after the last of a step average gradients of replicated weights."""
        loss = super().training_step(*args, **kwargs)
        if self._sharded is not None and self.accelerator.sync_gradients:
            self._sharded.average_gradients()
        return loss

    def evaluation_loop(self, *args, **kwargs):
        """Evaluate; outside training, FSDP2 ranks evaluate the complete model on their data.

        ``Trainer`` (5.23) refuses this.
        """
        if not self.is_fsdp_enabled or self.is_in_train:
            return super().evaluation_loop(*args, **kwargs)
        self.model.to(self.args.device)
        self.is_fsdp_enabled = False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``Trainer.save_model``. Under FSDP2, call on all ranks."""
        self.gather_model()  # before super(), as some releases write on rank 0 alone
        super().save_model(output_dir, _internal_call)

    # Private: save_model passes a gathered state_dict, but a packed model makes its own.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._save(output_dir, state_dict)
        sharded, self.model = self.model, self.unsharded_model
        try:
            super()._save(output_dir)
        finally:
            self.model = sharded

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """``Trainer.get_decay_parameter_names`` without the parameters of packed layers."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.rpartition(".")[2].startswith(PREFIX)]


def _require_same_layers(model: nn.Module, checkpoint: str | os.PathLike | None) -> None:
    """Raise if a checkpoint, if there is one, has other packed layers than the model."""
    if checkpoint is None or not os.path.isfile(path := os.path.join(checkpoint, CONFIG_NAME)):
        return
    with open(path, encoding="utf-8") as file:
        stored = json.load(file).get("quantization_config") or {}
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    in_model, in_checkpoint = (
        set(plan or {}) for plan in (getattr(config, "plan", None), stored.get("plan"))
    )
    if in_model != in_checkpoint:
        raise ValueError(
            f"invalid resume_from_checkpoint={os.fspath(checkpoint)!r}: it has "
            f"{len(in_checkpoint)} packed layers, the model has {len(in_model)}; load the model "
            "from that checkpoint with from_pretrained"
        )
