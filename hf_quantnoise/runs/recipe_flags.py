"""``--recipe``: values that flags get from a recipe, unless they are passed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from ..configuration import QuantizedModelConfig
from ..configuration.flags import errors_name_flags, form_of
from ..configuration.layer_storage import SELECTION
from ..configuration.options import changed_options, options_of
from ..model_families import skeleton_of
from ..recipes import ALLOCATED, TRAINING, Recipe, recipe
from .config_flags import FALLBACKS, NOISE_FLAGS, SHARED

BLOCKS = ("block_size", "n_centroids")  # of noise, which bit allocation sets
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
    with errors_name_flags({"size": "recipe"}):
        return recipe(size, skeleton_of(auto_class, config))


def flags_of(settings: Recipe) -> dict[str, Any]:
    """Return flag -> value of everything that a recipe changes."""
    values = _changed(settings.quantization) | _changed(settings.compression)
    for name, value in _changed(settings.noise).items():
        if name not in (*FALLBACKS, *SHARED):  # which noise reads from the flags of the model
            values[NOISE_FLAGS[name]] = value
    return {**values, "noise_after_finetuning": settings.length}


def complete(arguments: Any, settings: Recipe, values: Mapping[str, Any]) -> None:
    """Set what the arguments of a run with a recipe allocate, and the text that reports it.

    Args:
        arguments: the parsed command line.
        settings: the recipe.
        values: :func:`flags_of` it, which the command line may replace.
    """
    flags, quantization, noise = arguments.flags, arguments.quantization, arguments.noise
    stored = _other_storage(quantization, settings)
    replaced = {**stored, **_other_noise(flags, quantization, noise)}
    size = f"{settings.times_smaller:.1f} times smaller"
    start, closing = f"{size} with these flags:", []
    if stored:
        start = f"with these flags (without those that were passed, the file is {size}):"
    if settings.family in ALLOCATED and not replaced:
        arguments.allocated_family = settings.family
        arguments.noise_selection = _own_selection(settings, noise)
        times = settings.size.removesuffix("x")
        start = f"at least {times} times smaller with allocated bits and these flags:"
        closing = [ALLOCATES]
        if names := _joined(f"--{NOISE_FLAGS[name]}" for name in arguments.noise_selection):
            closing.append(f"Layers without noise by {names} are stored with allocated bits, too.")
    elif settings.family in ALLOCATED:
        passed = _joined(f"--{name} {_written(value)}" for name, value in replaced.items())
        verb = "was" if len(replaced) == 1 else "were"
        closing = [f"Bits are not allocated to the weights, since {passed} {verb} passed."]
    lines = [f"--recipe {settings.size}: {settings.family}, {start}"]
    parts = arguments.model, arguments.data, flags, arguments.compression, arguments.training
    arguments.recipe = "\n".join([*lines, *_shown(values, parts), *closing])


def _other_storage(quantization: QuantizedModelConfig, settings: Recipe) -> dict[str, Any]:
    """Return the passed flags that change how weights are stored."""
    given = settings.quantization
    names = [name for name in options_of(type(given)) if name != "seed"]
    passed = {name: getattr(quantization, name) for name in names}
    return {name: value for name, value in passed.items() if value != getattr(given, name)}


def _other_noise(flags: Any, quantization: Any, noise: Any) -> dict[str, Any]:
    """Return the passed flags that leave no training in which noise has allocated blocks."""
    if not flags.noise_after_finetuning:
        return {"noise_after_finetuning": flags.noise_after_finetuning}
    own = {name: getattr(noise, name) for name in BLOCKS}
    return {
        NOISE_FLAGS[name]: value
        for name, value in own.items()
        if value != getattr(quantization, name)
    }


def _own_selection(settings: Recipe, noise: Any) -> dict[str, Any]:
    """Return which layers passed flags select for noise."""
    own = {name: getattr(noise, name) for name in SELECTION}
    return {name: own[name] for name in own if own[name] != getattr(settings.noise, name)}


def _joined(words: Iterable[str]) -> str:
    *others, last = [*words] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _changed(config: Any) -> dict[str, Any]:
    """Return the options that are not defaults, as their flags hold them."""
    options, values = options_of(type(config)), changed_options(config)
    return {
        name: [value] if form_of(options[name]).type in (list[str], list[float]) else value
        for name, value in values.items()
    }


def _shown(defaults: Mapping[str, Any], parts: Iterable[Any]) -> list[str]:
    """Return a line for each flag of a recipe, with its value and whether it was passed."""
    values = {name: value for part in parts for name, value in vars(part).items()}
    lines = []
    for name, default in defaults.items():
        passed = "" if values[name] == default else f" (passed; recipe: {_written(default)})"
        lines.append(f"  --{name} {_written(values[name])}{passed}")
    return lines


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
