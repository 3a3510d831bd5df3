"""Checks shared by all exports."""

from __future__ import annotations

from torch import nn

from ..argument_checks import require_model
from ..modeling import packed_layers


def require_packed(model: nn.Module, caller: str) -> None:
    """Raise TypeError if the object is not a model, ValueError if it has no packed layer."""
    require_model(model)
    layers = [layer for _, layer in packed_layers(model)]
    if any(layer.dense_form is not None for layer in layers):
        raise ValueError(
            f"{caller}: the model is optimized for inference; call restore_packed(model) first"
        )
    if not layers:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no packed layer; compress it first with "
            "quantize_model(model, IPQConfig(...)) or QuantNoiseTrainer.compress"
        )
