"""A ``Trainer`` that knows packed models and mends what stock ``Trainer`` gets wrong for them."""

from __future__ import annotations

import inspect
import json
import os
import re

import torch
from torch import nn
from transformers import Trainer
from transformers.utils import CONFIG_NAME, logging

from ...modeling.packed import PREFIX
from .fsdp import ShardedCopy, require_fsdp2, share_what_rank_0_read

logger = logging.get_logger(__name__)

_PASSES_KWARGS_ON = re.compile(r"loss_function\([^()]*(?:\([^()]*\)[^()]*)*\*\*", re.DOTALL)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model that PEFT wrapped; any other as it is."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def undo_accelerate_prepare(model: nn.Module) -> nn.Module:
    """Takes off, in place, what accelerate leaves on a model that it has prepared: autocast around
    its forward, and the mark by which it is taken for prepared from then on. accelerate's own way
    (``unwrap_model(..., keep_fp32_wrapper=False)``, 1.15) takes transformers' decorators along."""
    held = vars(model)
    held.pop("_is_accelerate_prepared", None)
    before = held.pop("_original_forward", None)
    if before is not None:
        held.pop("forward", None)
        if model.forward != before:  # not that of its class
            model.forward = before
    return model


def loss_reads_num_items(model: nn.Module) -> bool:
    """Whether a model's loss is normalised by ``num_items_in_batch``, read off its forward.

    ``Trainer`` takes every forward with ``**kwargs`` for one that does. The heads of the BERT
    family accept them and ignore them (a plain mean), so that loss and gradient come out multiplied
    by the gradient accumulation steps.
    """
    model = without_adapters(model)
    try:
        source = inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        logger.warning(
            f"the source of {type(model).__name__}.forward cannot be read, so whether its loss "
            "heeds num_items_in_batch is left to transformers' guess."
        )
        return True
    return _PASSES_KWARGS_ON.search(source) is not None


def _bound_optimizer(trainer: Trainer) -> str | None:
    """Read off a trainer that was just made: once it has trained it has an optimizer of its own."""
    pair = trainer.optimizer, trainer.lr_scheduler
    if any(each is not None for each in pair):
        names = ["None" if each is None else type(each).__name__ for each in pair]
        return f"optimizers=({', '.join(names)})"
    if trainer.optimizer_cls_and_kwargs is None:
        return None
    optimizer_class, given = trainer.optimizer_cls_and_kwargs
    bound = [name for name in ("params", "model", "optimizer_dict") if name in given]
    name = getattr(optimizer_class, "__name__", type(optimizer_class).__name__)
    return f"optimizer_cls_and_kwargs=({name}, {{{bound[0]!r}: ...}})" if bound else None


class PackedModelTrainer(Trainer):
    """``Trainer`` with five guards, each over a public hook.

    * Gradient accumulation does not multiply the loss of heads that take a plain mean.
    * Centroids get no weight decay: it would pull them to zero, not regularise a weight.
    * A checkpoint of another structure (dense, or another stage) is refused; ``Trainer`` would load
      it with a warning and hand the optimizer state of other shapes to a fused kernel.
    * A model that was evaluated or trained before is trained with all processes, and compiled.
      accelerate (1.15) takes it for wrapped already, leaves DDP (or ``torch_compile``) out, and
      each rank trains on its own without a word.
    * Under FSDP2 a copy of the model is sharded (``sharded.py``). After ``train`` the model is
      whole again, the same object with the new weights, on every rank; the optimizer is gone.

    Attributes:
        bound_optimizer: what was given of an optimizer that only the parameters of now can have, in
            words; None without.

    Raises:
        ValueError: if the model cannot be sharded as the arguments ask for.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bound_optimizer = _bound_optimizer(self)
        require_fsdp2(self)
        share_what_rank_0_read(self, self.model)
        self._sharded: ShardedCopy | None = None
        if self.model_accepts_loss_kwargs and not loss_reads_num_items(self.model):
            self.model_accepts_loss_kwargs = False

    @property
    def plain_model(self) -> nn.Module:
        """The model as it is outside training; under FSDP2 with the numbers it had before."""
        return self.model if self._sharded is None else self._sharded.original

    def up_to_date_model(self) -> nn.Module:
        """The plain model with the numbers of now; under FSDP2 all ranks must ask for it."""
        if self._sharded is not None:
            self._sharded.put_back()
        return self.plain_model

    def train(self, *args, **kwargs):
        """``Trainer.train``, wrapped anew whatever was done with the model before."""
        wrapped = getattr(self.model_wrapped, "_orig_mod", self.model_wrapped)
        if wrapped is self.model:  # neither DDP nor anything else is around it
            self.model = self.model_wrapped = undo_accelerate_prepare(
                self.accelerator.unwrap_model(self.model)
            )
        if not self.is_fsdp_enabled:
            return super().train(*args, **kwargs)
        self._sharded = ShardedCopy(self.model, self.args.device)
        self.model = self.model_wrapped = self._sharded.model
        with self._sharded.rules(self.accelerator):
            result = super().train(*args, **kwargs)
        self._leave_sharded()
        return result

    def _leave_sharded(self) -> None:
        """Goes back to the plain model when training is over."""
        self.model = self.model_wrapped = self.callback_handler.model = self.up_to_date_model()
        self.optimizer = self.lr_scheduler = self._sharded = None
        self.accelerator.free_memory()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer; under FSDP2 with groups of their own for what is not sharded."""
        optimizer = super().create_optimizer(model)
        if self._sharded is not None:
            self._sharded.split_groups(optimizer.param_groups)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._sharded is not None:
            self._sharded.spread_state(self.optimizer)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """A micro-batch; after the last of a step the gradients of all ranks are one."""
        loss = super().training_step(*args, **kwargs)
        if self._sharded is not None and self.accelerator.sync_gradients:
            self._sharded.average_gradients()
        return loss

    def evaluation_loop(self, *args, **kwargs):
        """As in ``Trainer``; outside training each rank has the whole model and its share of the
        data, which ``Trainer`` (5.23) refuses to evaluate under FSDP2."""
        if not self.is_fsdp_enabled or self.is_in_train:
            return super().evaluation_loop(*args, **kwargs)
        self.model.to(self.args.device)
        self.is_fsdp_enabled = False
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in ``Trainer``; under FSDP2 all ranks must ask for it."""
        self.up_to_date_model()  # here, as some releases let rank 0 alone go on to write
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._save(output_dir, state_dict)
        # Not what Trainer gathered: a packed model makes its own state_dict.
        trained, self.model = self.model, self.plain_model
        try:
            super()._save(output_dir)
        finally:
            self.model = trained

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names ``Trainer`` decays, without the packed layers' parameters."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.rpartition(".")[2].startswith(PREFIX)]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        target = self.model if model is None else model
        config = getattr(getattr(target, "config", None), "quantization_config", None)
        own = set(getattr(config, "plan", None) or {})
        file_name = os.path.join(resume_from_checkpoint, CONFIG_NAME)
        if os.path.isfile(file_name):
            with open(file_name, encoding="utf-8") as file:
                stored = json.load(file).get("quantization_config") or {}
            theirs = set(stored.get("plan") or {})
            if own != theirs:
                raise ValueError(
                    f"resume_from_checkpoint={os.fspath(resume_from_checkpoint)!r} holds "
                    f"{len(theirs)} packed layers and the model {len(own)}; load the model from "
                    "that checkpoint (from_pretrained) and give it to the trainer"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
