"""The precision of trained weights: mixed precision needs them in float32."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


def check_trained_dtypes(model: nn.Module, args: TrainingArguments) -> None:
    """Warn, once, if weights are trained in 16 bits, in which small updates are rounded away.

    transformers loads a model in the dtype of its checkpoint. Frozen weights do not count.

    Raises:
        ValueError: if they are float16 and ``fp16`` is set, whose gradient scaler refuses them.
    """
    trained = [p.dtype for p in model.parameters() if p.requires_grad]
    for dtype in (torch.float16, torch.bfloat16):
        if (count := trained.count(dtype)) == 0:
            continue
        name = str(dtype).removeprefix("torch.")
        way_out = "load the model with dtype='float32'"
        if dtype == torch.float16 and args.fp16:
            raise ValueError(
                f"invalid model for fp16=True: {count} of {len(trained)} trained parameters are "
                f"{name}, expected float32, which fp16 computes with in float16; {way_out}"
            )
        logger.warning_once(
            f"{count} of {len(trained)} trained parameters are {name}, in which small updates are "
            f"rounded away; {way_out}, and set bf16=True or fp16=True for mixed precision"
        )
