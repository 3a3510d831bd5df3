"""Checks of ``layer_quantizers``: quantizer settings of single layers by name.

They are the result of bit allocation: saved, possibly edited by hand, and used again.
"""

from __future__ import annotations

from typing import Any

from .checks import invalid
from .entries import QUANTIZERS, check_settings, settings_of
from .options import options_of

# The scheme of a layer that stays in floating point.
DENSE = "dense"


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
        checked[layer] = settings_of(entry)
        if entry["scheme"] != DENSE:
            check_settings(checked[layer], f"{place}: ")
    return checked


def with_codebook_bits(entry: dict[str, Any], bits: int) -> dict[str, Any]:
    """Return settings of a layer with ``bits`` per centroid value, unless they have their own."""
    scheme = entry["scheme"]
    if scheme == DENSE or "codebook_bits" not in options_of(QUANTIZERS[scheme]):
        return entry
    return {"codebook_bits": bits, **entry}
