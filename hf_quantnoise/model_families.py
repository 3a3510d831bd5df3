"""Families of models: encoders, language models and image models, for which recipes differ."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
)

from .structure import find_layers

ENCODER, LANGUAGE_MODEL, IMAGE_MODEL = FAMILIES = ("encoder", "language_model", "image_model")


def family_of(model: PreTrainedModel) -> str:
    """Return the family of a model.

    An image model has most of its weights in convolutions, a language model generates text; all
    others, also vision transformers, are encoders.
    """
    layers = find_layers(model)
    in_convolutions = sum(layer.numel for layer in layers if layer.group == "conv")
    if 2 * in_convolutions > sum(layer.numel for layer in layers):
        return IMAGE_MODEL
    return LANGUAGE_MODEL if model.can_generate() else ENCODER


@cache
def reference_model(family: str) -> PreTrainedModel:
    """Return the model, on the meta device, that recipes without a model are for."""
    auto_class, config = {
        ENCODER: (AutoModelForSequenceClassification, BertConfig()),
        LANGUAGE_MODEL: (AutoModelForCausalLM, GPT2Config()),
        IMAGE_MODEL: (AutoModelForImageClassification, ResNetConfig()),
    }[family]
    return skeleton_of(auto_class, config)


def skeleton_of(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of a config on the meta device, with its ties."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(config)
    model.tie_weights()
    return model
