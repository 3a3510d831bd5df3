"""What a card and the logs of a pass have in common: tags, and metrics in words."""

from __future__ import annotations

from ..repository import TAG

# The second says how to load the model even on a card that is not ours: model.push_to_hub writes
# transformers' own, whose top these tags are.
TAGS = (TAG, "import-hf_quantnoise")

# Where a pass leaves, on the model, what its card is to say.
CARD_ATTRIBUTE = "quantnoise_card"

_NOT_METRICS = ("runtime", "per_second", "preparation_time", "epoch")


def is_metric(name: str, value: object) -> bool:
    """Whether an entry of ``evaluate``'s result is a score, and no timing."""
    return isinstance(value, float) and not any(word in name for word in _NOT_METRICS)


def plain_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """``evaluate``'s result without timings, and names without ``eval_``."""
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if is_metric(name, value)
    }


def format_metrics(metrics: dict[str, float]) -> str:
    """``evaluate``'s result on one line, without timings: ``"loss 0.3100, accuracy 0.9100"``."""
    return ", ".join(f"{name} {value:.4f}" for name, value in plain_metrics(metrics).items())
