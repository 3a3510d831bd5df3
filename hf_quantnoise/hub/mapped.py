"""Tensors that are views of a memory-mapped file, copied where a view would do harm."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compat import own_parameters
from ..modeling import PackedLayer


@torch.no_grad()
def release_files(model: PreTrainedModel) -> None:
    """Copy tensors that are views of a memory-mapped file, which would keep all of it in memory."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


@torch.no_grad()
def align(model: PreTrainedModel) -> None:
    """Copy dense matrices that are not aligned to a cache line, as views of a file may be.

    Products take another code path for these, whose last bits differ from the saved model's. Tables
    and packed weights are copied when they are used, so their alignment does not matter.
    """
    for module in model.modules():
        if isinstance(module, PackedLayer | nn.Embedding):
            continue
        for parameter in own_parameters(module).values():
            if parameter is None or parameter.dim() < 2 or parameter.device.type != "cpu":
                continue
            if parameter.data_ptr() % 64:  # bytes of a cache line
                parameter.data = parameter.data.clone()
