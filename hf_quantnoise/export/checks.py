"""What every export asks of a model."""

from __future__ import annotations

from torch import nn

from ..modeling import packed_layers


def require_packed(model: nn.Module, caller: str) -> None:
    """Raises ValueError where a model has no packed layer, saying how to get one."""
    if next(iter(packed_layers(model)), None) is None:
        raise ValueError(
            f"{caller}: {type(model).__name__} has no packed layer; compress it first, with "
            "quantize_model(model, IPQConfig(...)) or QuantNoiseTrainer.compress"
        )
