"""Checks shared by all exports."""

from __future__ import annotations

from torch import nn

from ..modeling import packed_layers


def require_packed(model: nn.Module, caller: str) -> None:
    """Raise ValueError if the model has no packed layer."""
    if next(iter(packed_layers(model)), None) is None:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no packed layer; compress it first with "
            "quantize_model(model, IPQConfig(...)) or QuantNoiseTrainer.compress"
        )
