"""Copies of a model that take no memory for their weights: for planning and measuring."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel


def copy_sharing_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with new modules and configs that holds the model's parameters and buffers."""
    return deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})


def copy_with_own_parameters(model: nn.Module) -> nn.Module:
    """Return a copy whose new Parameters use the model's memory; buffers are copied."""
    return deepcopy(
        model,
        {
            id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
            for parameter in model.parameters()
        },
    )


def copy_on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy on the meta device, with the model's ties."""
    return deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in _tensors(model)})


def _tensors(model: nn.Module):
    return chain(model.parameters(), model.buffers())


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor.detach(), device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty
