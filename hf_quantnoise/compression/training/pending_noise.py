"""Noise on the layers of later stages while one stage is finetuned (sections 3.2 and 4)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import Trainer

from ...configuration import QuantNoiseConfig
from ...noise import noised_layers


def noise_to_keep(trainer: Trainer, keep_noise: bool) -> QuantNoiseConfig | None:
    """Return the trainer's noise config; None if ``keep_noise`` is False.

    Raises:
        ValueError: if the noise is to be kept and the trainer has none.
    """
    if not keep_noise:
        return None
    config = getattr(trainer, "qn_config", None)
    if config is None:
        raise ValueError(
            "keep_noise=True requires a trainer with noise; pass a QuantNoiseConfig to "
            "QuantNoiseTrainer as third argument, or set keep_noise=False"
        )
    return config


class PendingNoise:
    """Selects the noise that a stage is finetuned with.

    Args:
        model: the model before its first stage.
        config: noise of the trainer; None keeps no noise.
    """

    def __init__(self, model: nn.Module, config: QuantNoiseConfig | None) -> None:
        self.config = config
        self.layer_names = [] if config is None else noised_layers(model, config)

    def config_for(self, pending_layers: Iterable[str]) -> QuantNoiseConfig | None:
        """Return the noise for the noised layers among ``pending_layers``; None without any.

        The rate is the final one, since its schedule ended in the finetuning before the
        compression. LayerDrop and layer sharing are off: layers may have been removed or shared
        already.
        """
        pending = set(pending_layers)
        names = [re.escape(name) for name in self.layer_names if name in pending]
        if self.config is None or not names:
            return None
        return replace(
            self.config,
            target_modules="|".join(names),
            exclude_modules=None,
            p_schedule="constant",
            layerdrop=0.0,
            share_layers=1,
        )
