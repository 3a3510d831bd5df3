"""Checks of the arguments of :class:`QuantNoiseTrainer`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from .argument_checks import require_instance, require_model, require_weights
from .compat.peft import has_adapters
from .configuration import QuantNoiseConfig
from .distributed import is_distributed, require_one_gpu_per_process
from .modeling import packed_layers

logger = logging.get_logger(__name__)


def warn_of_adapters(model: nn.Module) -> None:
    """Warn that the layers of a model with adapters cannot be packed."""
    if has_adapters(model) and not any(packed_layers(model)):
        logger.warning(
            "the model has PEFT adapters, which compress() cannot pack: after train(), set "
            "trainer.model = trainer.model.merge_and_unload()"
        )


def check_arguments(model: Any, args: Any, qn_config: Any, model_init: Any) -> None:
    """Raise an error if the first arguments of the trainer have the wrong types."""
    order = "call e.g. QuantNoiseTrainer(model, TrainingArguments(...), QuantNoiseConfig(...))"
    if model is None and model_init is None:
        raise TypeError(f"invalid model: got None, expected a model, or model_init; {order}")
    if args is not None:
        require_instance("args", args, TrainingArguments, "TrainingArguments", order)
        if getattr(args, "predict_with_generate", False):
            raise ValueError(
                "unsupported predict_with_generate=True: only Seq2SeqTrainer evaluates with "
                "generate; set predict_with_generate=False, or pass QuantNoiseCallback(config) to "
                "a Seq2SeqTrainer"
            )
    if qn_config is not None:
        require_instance(
            "qn_config", qn_config, QuantNoiseConfig,
            "a QuantNoiseConfig as third argument, e.g. QuantNoiseConfig(noise='proxy', p=0.1)",
            "pass data_collator and the rest by name",
        )  # fmt: skip
    if model is not None:
        require_model(model, nn.Module)
        if not is_distributed():  # ranks of FSDP may have no values yet
            require_weights(model)


def require_ddp_for_centroids(trainer: Trainer, noise: QuantNoiseConfig) -> None:
    """Raise if noise trains centroids under FSDP2 or ``nn.DataParallel``.

    accelerate (1.15) shards an optimizer only if all of its parameters are in the model.
    """
    if not noise.learn_codebooks:
        return
    require_one_gpu_per_process(trainer.args.n_gpu, "learn_codebooks=True")
    if trainer.is_fsdp_enabled:
        raise ValueError(
            "learn_codebooks=True does not work under FSDP; train with DDP (remove the fsdp "
            "arguments), or set learn_codebooks=False"
        )
