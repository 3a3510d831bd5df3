"""A ``Trainer`` that knows packed models and mends what stock ``Trainer`` gets wrong for them."""

from __future__ import annotations

import inspect
import json
import os
import re

from torch import nn
from transformers import Trainer
from transformers.utils import CONFIG_NAME, logging

from ..modeling.packed import PREFIX

logger = logging.get_logger(__name__)

_PASSES_KWARGS_ON = re.compile(r"loss_function\([^()]*(?:\([^()]*\)[^()]*)*\*\*", re.DOTALL)


def loss_reads_num_items(model: nn.Module) -> bool:
    """Whether a model's loss is normalised by ``num_items_in_batch``, read off its forward.

    ``Trainer`` takes every forward with ``**kwargs`` for one that does. The heads of the BERT
    family accept them and ignore them (a plain mean), so that loss and gradient come out multiplied
    by the gradient accumulation steps.
    """
    while hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    try:
        source = inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        logger.warning(
            f"the source of {type(model).__name__}.forward cannot be read, so whether its loss "
            "heeds num_items_in_batch is left to transformers' guess."
        )
        return True
    return _PASSES_KWARGS_ON.search(source) is not None


class GuardedTrainer(Trainer):
    """``Trainer`` with four guards, each over a public hook.

    * Gradient accumulation does not multiply the loss of heads that take a plain mean.
    * Centroids get no weight decay: it would pull them to zero, not regularise a weight.
    * A checkpoint of another structure (dense, or another stage) is refused; ``Trainer`` would load
      it with a warning and hand the optimizer state of other shapes to a fused kernel.
    * A model that was evaluated before is trained with all processes. accelerate (1.15) takes it
      for wrapped already, leaves DDP out, and each rank trains on its own without a word.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.model_accepts_loss_kwargs and not loss_reads_num_items(self.model):
            self.model_accepts_loss_kwargs = False

    def train(self, *args, **kwargs):
        """``Trainer.train``, under DDP whatever was done with the model before."""
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

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
