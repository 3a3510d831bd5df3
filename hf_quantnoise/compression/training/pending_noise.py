"""The noise of a run on the layers whose stage is yet to come: finetuning a stage makes the others
ready for theirs, as the finetuning before the pass did (section 4 within section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import Trainer

from ...configuration import QuantNoiseConfig
from ...noise import noised_layers


def noise_to_keep(trainer: Trainer, keep_noise: bool) -> QuantNoiseConfig | None:
    """The noise of a trainer, if it is to be kept in the pass.

    Raises:
        ValueError: if it has none.
    """
    if not keep_noise:
        return None
    config = getattr(trainer, "qn_config", None)
    if config is None:
        raise ValueError(
            "keep_noise=True needs the noise of the run, and the trainer has none; give "
            "QuantNoiseTrainer a QuantNoiseConfig as its third argument, or set keep_noise=False"
        )
    return config


class PendingNoise:
    """Which noise each stage is finetuned with.

    Args:
        model: as it is before its first stage.
        config: the noise of the run; None keeps none.
    """

    def __init__(self, model: nn.Module, config: QuantNoiseConfig | None) -> None:
        self.config = config
        self.names = [] if config is None else noised_layers(model, config)

    def on(self, waiting: Iterable[str]) -> QuantNoiseConfig | None:
        """The noise on those layers that have it and wait; None where there is none.

        Its rate is the full one: the schedule ran out in the finetuning before. Whole layers are
        not skipped: a stage may have taken out what would be skipped.
        """
        waiting = set(waiting)
        names = [re.escape(name) for name in self.names if name in waiting]
        if not names:
            return None
        return replace(
            self.config,
            target_modules="|".join(names),
            exclude_modules=None,
            p_schedule="constant",
            layerdrop=0.0,
            share_layers=1,
        )
