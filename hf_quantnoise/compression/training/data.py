"""Training data of a trainer, for calibration and measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from transformers import Trainer

from ...compat import prepare_inputs


def first_batches(trainer: Trainer, count: int) -> Iterator[Mapping[str, Any]]:
    """Yield the first training batches of a trainer; none without training data.

    The data loader is created when the first batch is requested.
    """
    if trainer.train_dataset is not None:
        for batch in islice(trainer.get_train_dataloader(), count):
            yield prepare_inputs(trainer, batch)
