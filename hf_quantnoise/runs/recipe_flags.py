"""``--recipe``: values that flags get from a recipe, unless they are passed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from ..configuration import QuantizedModelConfig, QuantNoiseConfig
from ..configuration.flags import errors_name_flags, form_of
from ..configuration.options import changed_options, options_of
from ..recipes import ALLOCATED, TRAINING, Recipe, recipe
from .config_flags import FALLBACKS, NOISE_FLAGS, SHARED

SELECTION = ("target_modules", "exclude_modules")  # which layers have noise
ALLOCATES = (
    "After the finetuning, bits are allocated to the weights for this size, in place of the block "
    "sizes above; pass another --block_size to use your own."
)


def check_recipe(flags: Any) -> None:
    """Raise a ``ValueError`` if other flags leave a recipe no choice."""
    if flags.scheme != "ipq":
        raise ValueError(
            f"--recipe {flags.recipe} requires --scheme ipq (got --scheme {flags.scheme}); remove "
            "one of them"
        )
    for name in ("target_size_mb", "target_bits_per_weight"):
        if (target := getattr(flags, name)) is not None:
            raise ValueError(
                f"--recipe {flags.recipe} chooses the size, as --{name} {target} does; remove one "
                "of them"
            )


def recipe_for(size: str, auto_class: Any, config: PretrainedConfig) -> Recipe:
    """Return the recipe for the model of a config."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    model.tie_weights()
    with errors_name_flags({"size": "recipe"}):
        return recipe(size, model)


def flags_of(settings: Recipe) -> dict[str, Any]:
    """Return flag -> value of everything that a recipe changes."""
    values = _changed(settings.quantization) | _changed(settings.compression)
    for name, value in _changed(settings.noise).items():
        if name not in (*FALLBACKS, *SHARED):  # which noise reads from the flags of the model
            values[NOISE_FLAGS[name]] = value
    return {**values, "noise_after_finetuning": settings.length}


def allocates(
    settings: Recipe, quantization: QuantizedModelConfig, noise: QuantNoiseConfig | None
) -> bool:
    """Return whether bits are allocated: unless passed flags change what is stored or noised."""
    if noise is None or settings.family not in ALLOCATED:
        return False
    if any(getattr(noise, name) != getattr(settings.noise, name) for name in SELECTION):
        return False
    own, given = map(changed_options, (quantization, settings.quantization))
    return {**own, "seed": 0} == {**given, "seed": 0}


def _changed(config: Any) -> dict[str, Any]:
    """Return the options that are not defaults, as their flags hold them."""
    options, values = options_of(type(config)), changed_options(config)
    return {
        name: [value] if form_of(options[name]).type in (list[str], list[float]) else value
        for name, value in values.items()
    }


def shown(settings: Recipe, defaults: Mapping[str, Any], parts: Iterable[Any]) -> str:
    """Return the text that reports the flags of a recipe, and which were passed instead.

    Args:
        settings: the recipe.
        defaults: :func:`flags_of` it.
        parts: the dataclasses of the parsed flags.
    """
    values = {name: value for part in parts for name, value in vars(part).items()}
    lines = [
        f"--recipe {settings.size}: {settings.family}, {settings.times_smaller:.1f} times smaller "
        "with these flags:"
    ]
    for name, default in defaults.items():
        passed = "" if values[name] == default else f" (passed; recipe: {_written(default)})"
        lines.append(f"  --{name} {_written(values[name])}{passed}")
    return "\n".join(lines)


def _written(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def lengths() -> str:
    """Return the sentence of ``--help`` on the time that the recipes take."""
    parts = [f"{training.length:g} ({size})" for size, training in TRAINING.items()]
    return (
        f"After the finetuning it trains for {', '.join(parts)} times as many steps, which also "
        "run the teacher."
    )
