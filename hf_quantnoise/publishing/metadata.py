"""Metadata of a model card: the YAML block that the Hub reads."""

from __future__ import annotations

import math
import os
from typing import Any

from huggingface_hub import CardData, EvalResult, HfApi, try_to_load_from_cache
from transformers.utils import logging

from ..hub.card import plain_metrics
from ..repository import CARD, card_in, read_card

logger = logging.get_logger(__name__)

_TIMEOUT = 10  # seconds, for the card of a base model
_FROM_BASE = ("language", "license", "license_name", "license_link")


def facts_of_base(name: str | None) -> dict[str, Any]:
    """Return languages and license as the card of a base model states them, if it does.

    Args:
        name: a local folder or a repository. The repository's card is read from the cache or,
            unless the Hub is offline, from the Hub.
    """
    try:
        data = _data_of_card(name) if name else None
    except Exception as error:  # of any type, depending on the HTTP client; the card may be damaged
        logger.info(f"no license and languages on the card: that of {name!r} is unknown ({error})")
        return {}
    values = {field: getattr(data, field, None) for field in _FROM_BASE}
    return {field: value for field, value in values.items() if _is_text(value)}


def _data_of_card(name: str) -> CardData | None:
    if os.path.isdir(name):
        card = card_in(name)
        return None if card is None else card.data
    if isinstance(cached := try_to_load_from_cache(name, CARD), str):
        return read_card(cached).data
    return HfApi().model_info(name, timeout=_TIMEOUT).card_data


def _is_text(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and each for each in values)


def evaluation_results(
    metrics: dict[str, float],
    task: str | None,
    dataset: str | None,
    dataset_id: str | None,
    config: str | None,
    split: str | None,
) -> list[EvalResult]:
    """Return metrics as results of the Hub's ``model-index``, without the loss and infinities."""
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=dataset_id or dataset or "unknown",
            dataset_name=dataset or dataset_id or "unknown",
            dataset_config=config,
            dataset_split=split,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in plain_metrics(metrics).items()
        if name != "loss" and math.isfinite(value)
    ]
