"""Tags and metric formatting, shared by model cards and the logs of compression runs."""

from __future__ import annotations

from typing import Any

from ..repository import TAG

# The second tag hints at how to load the model on transformers' own card as well, which
# model.push_to_hub writes with these tags at the top.
TAGS = (TAG, "import-hf_quantnoise")

# Attribute of a compressed model that holds its QuantNoiseCard.
CARD_ATTRIBUTE = "quantnoise_card"

# First stage of a compression history: the model before compression, and in its place the weights
# that noise of rate 1 has trained, which score like no model that is ever used.
DENSE, LATENT = "dense", "latent weights"

_NOT_METRICS = ("runtime", "per_second", "preparation_time", "epoch")


def is_metric(name: str, value: object) -> bool:
    """Return whether an entry of ``evaluate``'s result is a metric rather than a timing."""
    is_float = isinstance(_plain(value), float)
    return is_float and not any(word in name for word in _NOT_METRICS)


def _plain(value: Any) -> Any:
    """Return a scalar of numpy or torch, which YAML cannot store, as a Python number."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def plain_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return ``evaluate``'s result without timings, and without the prefix ``eval_``."""
    return {
        name.removeprefix("eval_"): _plain(value)
        for name, value in metrics.items()
        if is_metric(name, value)
    }


def format_metrics(metrics: dict[str, float]) -> str:
    """Format ``evaluate``'s result on one line: ``"loss 0.3100, accuracy 0.9100"``."""
    return ", ".join(f"{name} {value:.4f}" for name, value in plain_metrics(metrics).items())
