"""Checks of the entries of a saved plan: how a layer is stored, and the layer itself.

A plan comes from a file, so everything about it is checked before a tensor is allocated. The
settings of an entry are the fields of its quantizer (``quantizers/``), which declares their checks;
``layer_quantizers`` has the same settings.
"""

from __future__ import annotations

from typing import Any

from ..registry import Registry, suggestion
from ..structure import GROUPS
from ..text import printable
from .checks import Check, by_layer, integer, invalid, layer_name, one_of
from .options import options_of

# Scheme of an entry -> its quantizer, a dataclass.
QUANTIZERS: Registry[Any] = Registry("quantizer", filled_by="quantizers")
MAX_BLOCK_SIZE = 65_536
MAX_CENTROIDS = 65_536
# Each entry takes about 0.3 ms of loading, most of it in transformers, which copies the config.
MAX_PLAN_ENTRIES = 25_000

_REQUIRED = ("scheme", "group", "rows", "columns")


# The keys of an entry that describe the layer and not how its weight is stored.
_LAYER_CHECKS: dict[str, Check] = {
    "group": one_of(GROUPS),
    "rows": integer(1),
    "columns": integer(1),
    "activation_bits": integer(1, 8),
    "tied_to": layer_name,
}
LAYER_KEYS = tuple(_LAYER_CHECKS)


def check_settings(settings: dict[str, Any], place: str = "") -> None:
    """Raise ValueError if a scheme or one of its settings is unknown or invalid.

    ``place`` comes before the name of the setting in the error.
    """
    if (scheme := settings.get("scheme")) not in QUANTIZERS:
        expected = f"one of {', '.join(QUANTIZERS)}{suggestion(scheme, QUANTIZERS)}"
        raise invalid(f"{place}scheme", scheme, expected)
    declared = options_of(QUANTIZERS[scheme])
    for key, value in settings.items():
        if key == "scheme":
            continue
        if key not in declared:
            expected = f"only {', '.join(declared)} with scheme={scheme!r}"
            raise invalid(
                f"{place}{printable(key):.100}", value, expected + suggestion(key, declared)
            )
        for check in declared[key].checks:
            check(f"{place}{key}", value)


def quantizer_from_dict(values: dict[str, Any]) -> Any:
    """Return the quantizer of some settings; ValueError if the scheme or a setting is invalid."""
    check_settings(values)
    settings = {key: value for key, value in values.items() if key != "scheme"}
    return QUANTIZERS[values["scheme"]](**settings)


def plan_entries(name: str, value: Any) -> None:
    """A plan: dict from layer name to the layer and how it is stored.

    An entry has the keys of ``LAYER_KEYS`` and the fields of its quantizer, and no others: a layout
    with more of them gets another ``format_version``.
    """
    if isinstance(value, dict) and len(value) > MAX_PLAN_ENTRIES:
        raise ValueError(
            f"invalid {name}: got {len(value):,} entries, expected up to {MAX_PLAN_ENTRIES:,}; "
            "restore the original file"
        )
    by_layer(_check_entry)(name, value)
    for layer, entry in value.items():
        source = entry.get("tied_to")
        if source is None:
            continue
        place = f"{name}[{layer!r}]: tied_to"
        if source not in value or "tied_to" in value[source]:
            raise invalid(place, source, "another layer of the plan, that is not tied itself")
        if _of_weight(entry) != _of_weight(value[source]):
            expected = "a layer of the same size with the same settings, as both hold one weight"
            raise invalid(place, source, expected)


def _check_entry(place: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise invalid(place, entry, "a dict with the keys scheme, group, rows and columns")
    for key in _REQUIRED:
        if key not in entry:
            raise ValueError(f"invalid {place}: {key} is missing; restore the original file")
    for key, check in _LAYER_CHECKS.items():
        if key in entry:
            check(f"{place}: {key}", entry[key])
    settings = settings_of(entry)
    check_settings(settings, f"{place}: ")
    quantizer = QUANTIZERS[settings.pop("scheme")](**settings)
    if reason := quantizer.check(entry["rows"], entry["columns"]):
        sizes = {key: entry[key] for key in ("rows", "columns")} | settings
        found = ", ".join(f"{key}={value!r}" for key, value in sizes.items())
        raise ValueError(f"invalid {place}: {reason} ({found}); restore the original file")


def _of_weight(entry: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return entry["rows"] * entry["columns"], settings_of(entry)


def settings_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an entry that describes how the weight is stored."""
    return {key: value for key, value in entry.items() if key not in LAYER_KEYS}
