"""Checks of ``layer_quantizers``: quantizer settings of single layers by name.

They are the result of bit allocation: saved, possibly edited by hand, and used again.
"""

from __future__ import annotations

from typing import Any

from .checks import Check, integer, invalid, one_of

# The scheme of a layer that stays in floating point.
DENSE = "dense"
MAX_BLOCK_SIZE = 65_536
MAX_CENTROIDS = 65_536

# The keys of a plan's entry that describe the layer and not how its weight is stored.
LAYER_KEYS = ("group", "rows", "columns", "activation_bits", "tied_to")

# Settings that are known here. Whether a scheme exists and has a setting is checked by the
# quantizers, when the plan is made.
_CHECKS: dict[str, Check] = {
    "block_size": integer(1, MAX_BLOCK_SIZE),
    "n_centroids": integer(2, MAX_CENTROIDS),
    "codebook_bits": one_of((32, 16, 8)),
    "n_iter": integer(1, 100_000),
    "bits": integer(1, 8),
}


def checked_layer_quantizers(name: str, value: Any) -> dict[str, dict[str, Any]]:
    """Return the settings of a field by layer name, without the keys that describe the layer."""
    if not isinstance(value, dict):
        expected = 'a dict from layer name to settings, e.g. {"fc": {"scheme": "int", "bits": 4}}'
        raise invalid(name, value, expected)
    checked = {}
    for layer, entry in value.items():
        place = f"{name}[{layer!r}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("scheme"), str):
            raise invalid(
                place,
                entry,
                'a dict with a "scheme", e.g. {"scheme": "pq", "block_size": 8, "n_centroids": '
                '256}, {"scheme": "int", "bits": 4} or {"scheme": "dense"}',
            )
        for setting, check in _CHECKS.items():
            if setting in entry:
                check(f"{place}: {setting}", entry[setting])
        checked[layer] = {key: entry[key] for key in entry if key not in LAYER_KEYS}
    return checked
