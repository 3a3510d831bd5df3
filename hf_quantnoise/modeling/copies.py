"""Copies of a model that cost no memory: to plan on, to measure on, to count bytes of."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel


def copy_without_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose modules and configs are its own and whose parameters and buffers are the
    model's: layers can be taken out, shared or given other weights without a change to the model.
    """
    return deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})


def copy_of_parameters(model: nn.Module) -> nn.Module:
    """A copy with Parameters of its own, which hold their numbers where the model's do until they
    are given others; buffers are copied."""
    return deepcopy(
        model,
        {
            id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
            for parameter in model.parameters()
        },
    )


def copy_of_shapes(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the meta device, with the model's ties."""
    return deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in _tensors(model)})


def _tensors(model: nn.Module):
    return chain(model.parameters(), model.buffers())


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor.detach(), device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty
