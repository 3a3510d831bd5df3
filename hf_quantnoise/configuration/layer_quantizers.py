"""How single layers are stored, where a config says it by name: the part of a budget that is saved,
edited by hand, and used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..validation import check_choice, check_int

# The scheme of a layer that stays in floating point.
DENSE = "dense"
MAX_BLOCK_SIZE = 65_536
MAX_CENTROIDS = 65_536

# The keys of a plan's entry that describe the layer and not how its weight is stored.
LAYER_KEYS = ("group", "rows", "columns", "activation_bits", "tied_to")

# Settings that are known here. Whether a scheme exists and has a setting is for the quantizers to
# say, when the plan is made.
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "block_size": lambda name, value: check_int(name, value, 1, MAX_BLOCK_SIZE),
    "n_centroids": lambda name, value: check_int(name, value, 2, MAX_CENTROIDS),
    "codebook_bits": lambda name, value: check_choice(name, value, (32, 16, 8)),
    "n_iter": lambda name, value: check_int(name, value, 1, 100_000),
    "bits": lambda name, value: check_int(name, value, 1, 8),
}


def checked_layer_quantizers(name: str, value: Any) -> dict[str, dict[str, Any]]:
    """Settings by layer name, without what a plan's entry says of the layer itself.

    Args:
        name: name of the field, for errors.
        value: layer name -> ``{"scheme": "pq" | "int" | "dense", setting: value, ...}``; the
            entries of another model's plan will do.

    Raises:
        ValueError: naming layer, setting and value.
    """
    if not isinstance(value, dict):
        raise ValueError(
            f"{name}={value!r} must be a dict from layer name to settings, e.g. "
            '{"classifier.dense": {"scheme": "int", "bits": 4}}'
        )
    checked = {}
    for layer, entry in value.items():
        where = f"{name}[{layer!r}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("scheme"), str):
            raise ValueError(
                f'{where}={entry!r} must be a dict with a "scheme", e.g. '
                '{"scheme": "pq", "block_size": 8, "n_centroids": 256}, '
                '{"scheme": "int", "bits": 4} or {"scheme": "dense"}'
            )
        for setting, check in _CHECKS.items():
            if setting in entry:
                check(f"{where}: {setting}", entry[setting])
        checked[layer] = {key: own for key, own in entry.items() if key not in LAYER_KEYS}
    return checked


def check_target(name: str, value: Any) -> None:
    """A size: a finite number above zero, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < float("inf")):
        raise ValueError(f"{name}={value!r} must be a number above 0, or None")
