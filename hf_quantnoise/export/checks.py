"""Checks shared by all exports."""

from __future__ import annotations

from torch import nn

from ..argument_checks import require_model
from ..modeling import packed_layers


def require_packed(model: nn.Module, caller: str) -> None:
    """Raise TypeError if the object is not a model, ValueError if it has no packed layer."""
    require_model(model)
    if next(iter(packed_layers(model)), None) is None:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no packed layer; compress it first with "
            "quantize_model(model, IPQConfig(...)) or QuantNoiseTrainer.compress"
        )
