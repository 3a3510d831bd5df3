"""Copies of a model that take no memory for their weights: for planning and measuring."""

from __future__ import annotations

from copy import deepcopy

from torch import nn
from transformers import PreTrainedModel

from .non_trainable import NonTrainableParameter


def copy_sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with new modules and configs that holds the model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def copy_with_own_parameters(model: nn.Module) -> nn.Module:
    """Return a copy whose new Parameters and codes use the model's memory; buffers are copied."""
    tensors: dict[int, nn.Parameter] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
    }
    for buffer in model.buffers():
        if isinstance(buffer, NonTrainableParameter):
            tensors[id(buffer)] = NonTrainableParameter(buffer.data)
    return deepcopy(model, tensors)


def copy_on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy on the meta device, with the model's ties."""
    tensors = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        empty = parameter.detach().to("meta")
        tensors[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    return deepcopy(model, tensors)
