"""Statistics of BatchNorm, measured on training data while a ``Trainer`` trains."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .argument_checks import run_batch
from .batch_norm import Statistics, measure_bn_stats, set_bn_stats, tracking_norms
from .module_modes import evaluating

logger = logging.get_logger(__name__)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random generators inside the context, and restore their states after it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            set_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class TrainingStatistics:
    """Measures the statistics of BatchNorm on training data while a ``Trainer`` trains.

    The batches are random, and the same each time; streamed data, which has no length, gives its
    first ones. The trainer's data loader is not iterated, since the training reads from it.

    Args:
        args: the trainer's arguments.
        model: the model, with or without a wrapper.
        loader: the trainer's data loader of training data.
        n_batches: number of batches per rank; 0 measures nothing.
        forward: runs one batch; None calls the model with the arguments that it takes.
    """

    def __init__(
        self,
        args: TrainingArguments,
        model: nn.Module,
        loader: Any,
        n_batches: int,
        forward: Callable[[Any], object] | None = None,
    ) -> None:
        self.n_batches = n_batches if tracking_norms(model) else 0
        self.seed, self.batch_size = args.seed + args.process_index, args.train_batch_size
        self.model, self.loader = model, loader
        self.forward = forward or self._call_model
        if self.n_batches and not isinstance(loader, DataLoader):
            self.n_batches = 0
            logger.warning(
                "the statistics of BatchNorm are not measured for the weights without noise: the "
                "trainer's train_dataloader is a %s, expected a DataLoader; after train() call "
                "remove_quant_noise(model) and update_bn_stats(model, batches)",
                type(loader).__name__,
            )  # fmt: skip

    def check(self) -> None:
        """Raise ValueError if the model cannot run a batch, before the training starts."""
        if self.n_batches:
            with seeded(self.seed), evaluating(self.model), torch.no_grad():
                for batch in self._batches(1):
                    self.forward(batch)

    def measure(self) -> Statistics:
        """Return the statistics for the weights that the model has now."""
        if not self.n_batches:
            return {}
        with seeded(self.seed):
            return measure_bn_stats(self.model, self._batches(self.n_batches), self.forward)

    def update(self) -> None:
        """Set the statistics for the weights that the model has now."""
        set_bn_stats(self.measure())

    def _batches(self, n_batches: int) -> Iterator[dict[str, Any]]:
        data = self.loader.dataset
        generator = torch.Generator().manual_seed(self.seed)
        sized = has_length(data)
        loader: DataLoader = DataLoader(
            data,
            self.batch_size,
            sampler=RandomSampler(data, generator=generator) if sized else None,
            collate_fn=self.loader.collate_fn,
            drop_last=sized and len(data) >= self.batch_size,  # a single example has no variance
            generator=generator,
        )
        return islice(loader, n_batches)

    def _call_model(self, batch: Mapping[str, Any]) -> None:
        accepted = inspect.signature(self.model.forward).parameters.values()
        if not any(each.kind is each.VAR_KEYWORD for each in accepted):
            names = {each.name for each in accepted}
            batch = {name: value for name, value in batch.items() if name in names}
        device = next(self.model.parameters()).device
        run_batch(
            self.model, send_to_device(batch, device), "train_dataset",
            "set batch_norm_batches=0 in the QuantNoiseConfig, and after train() call "
            "update_bn_stats(model, batches)",
        )  # fmt: skip
