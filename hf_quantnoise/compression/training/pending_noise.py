"""Noise on the layers of later stages while one stage is finetuned (sections 3.2 and 4)."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from transformers import Trainer

from ...configuration import QuantNoiseConfig
from ...noise import find_state


def noise_to_keep(trainer: Trainer, keep_noise: bool) -> QuantNoiseConfig | None:
    """Return the noise config that the trainer must have; None if ``keep_noise`` is False."""
    if not keep_noise:
        return None
    config = getattr(trainer, "qn_config", None)
    if config is None:
        raise ValueError(
            "keep_noise=True requires a trainer with noise; pass a QuantNoiseConfig to "
            "QuantNoiseTrainer as third argument, or set keep_noise=False"
        )
    noise = find_state(trainer.accelerator.unwrap_model(trainer.model))
    return config if noise is None else noise.config  # with a number as frequent_rows


def pending_noise(
    config: QuantNoiseConfig | None, noised: Collection[str], pending: Collection[str]
) -> QuantNoiseConfig | None:
    """Return a config for the layers that are both noised and pending; None without any.

    The rate is the final one, since its schedule ended in the finetuning before the compression.
    LayerDrop and layer sharing are off: layers may have been removed or shared already. Centroids
    are fitted, not trained: the optimizer of a stage has the parameters of the model alone.
    """
    names = [re.escape(name) for name in noised if name in pending]
    if config is None or not names:
        return None
    return replace(
        config,
        target_modules="|".join(names),
        exclude_modules=None,
        p_schedule="constant",
        layerdrop=0.0,
        share_layers=1,
        learn_codebooks=False,
        batch_norm_batches=0,  # the stage measures the statistics after its training
    )
