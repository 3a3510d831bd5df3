"""Times of forward passes of several models, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

ROUNDS = 11  # that are timed
WARM_UP = 2  # rounds before: the first ones allocate memory


def latencies(
    models: Sequence[PreTrainedModel], batch: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """Return the milliseconds of a forward pass of each model, and its speed.

    Each round times every model once, so that the load of the machine is the same for all.

    Args:
        models: the first one has speed 1; all are on the same device.
        batch: keyword arguments; labels are not passed.

    Returns:
        Medians over rounds: of the milliseconds, and of the time of the first model divided by
        that of the model.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    rounds = [[_seconds(model, inputs) for model in models] for _ in range(WARM_UP + ROUNDS)]
    return [
        (1e3 * median(times), median(row[0] / row[number] for row in rounds[WARM_UP:]))
        for number, times in enumerate(zip(*rounds[WARM_UP:], strict=True))
    ]


@torch.no_grad()
def _seconds(model: PreTrainedModel, inputs: Mapping[str, Any]) -> float:
    model.eval()
    start = time.perf_counter()
    model(**inputs)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main_input_shape(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Return name and shape of the main input in a batch (examples x tokens, for text)."""
    name = model.main_input_name if model.main_input_name in batch else next(iter(batch))
    return name, list(batch[name].shape)
