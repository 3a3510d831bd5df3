"""The model card: how to load the model first, then what was done to it and what it cost."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..configuration import QuantNoiseConfig

# The second says how to load the model even on a card that is not ours: model.push_to_hub writes
# transformers' own, whose top these tags are.
TAGS = ("quant-noise", "import-hf_quantnoise")
_START = "<!-- hf_quantnoise -->"


def _loading(model: PreTrainedModel) -> str:
    return (
        "> This model is stored as codes and codebooks. Load it with\n>\n"
        "> ```python\n"
        "> import hf_quantnoise  # pip install hf-quantnoise; without it transformers refuses\n"
        "> from hf_quantnoise import AutoQuantizedModel\n>\n"
        '> model = AutoQuantizedModel.from_pretrained("this/repository")\n'
        "> ```\n"
    )


_NOT_METRICS = ("runtime", "per_second", "preparation_time", "epoch")


def is_metric(name: str, value: object) -> bool:
    """Whether an entry of ``evaluate``'s result is a score, and no timing."""
    return isinstance(value, float) and not any(word in name for word in _NOT_METRICS)


def format_metrics(metrics: dict[str, float]) -> str:
    """``evaluate``'s result on one line, without timings: ``"loss 0.3100, accuracy 0.9100"``."""
    return ", ".join(
        f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in metrics.items()
        if is_metric(name, value)
    )


def _history(history: list[dict[str, Any]]) -> str:
    lines = ["| stage | layers | relative error | MB on disk | metrics |", "|---|---|---|---|---|"]
    for record in history:
        lines.append(
            f"| {record['stage']} | {record['layers']} | {record['relative_error']:.4f} | "
            f"{record['mb']:.2f} | {format_metrics(record['metric'])} |"
        )
    return "\n".join(lines)


def card_section(
    model: PreTrainedModel, noise: QuantNoiseConfig | None, history: list[dict[str, Any]]
) -> str:
    """The package's part of a model card, in Markdown.

    Args:
        model: the model, dense or packed.
        noise: the noise it was trained with.
        history: records of the staged pass.
    """
    parts = [_START]
    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        parts.append(_loading(model))
    parts.append("## Quantization noise and compression\n")
    if noise is not None:
        settings = ", ".join(f"`{name}` at rate {rate:g}" for name, rate in noise.noises)
        parts.append(f"Finetuned with quantization noise: {settings}.\n")
    if history:
        parts.append(_history(history) + "\n")
    return "\n".join(parts)


def add_card_section(
    file_name: str | os.PathLike,
    model: PreTrainedModel,
    noise: QuantNoiseConfig | None,
    history: list[dict[str, Any]],
) -> None:
    """Puts the package's section at the top of a card, and its tag among the card's tags.

    Args:
        file_name: a README.md that exists.
    """
    card = ModelCard.load(file_name)
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    text = card.text.split(_START)[0] if _START in card.text else card.text
    card.text = card_section(model, noise, history) + "\n" + text.lstrip()
    card.save(file_name)
