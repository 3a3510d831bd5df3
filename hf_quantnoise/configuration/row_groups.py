"""Tables of token ids that are stored in two groups of rows, the most frequent rows first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers.utils import logging

from ..structure import find_layers, select_layers, stage_of
from .checks import invalid, is_int, rows_or_share, sizes

logger = logging.get_logger(__name__)


def rows_by_layer(name: str, value: Any) -> None:
    """As :func:`rows_or_share`, or a dict from structure group or regex to a number of rows."""
    if isinstance(value, dict):
        sizes(1, 2**31)(name, value)
    else:
        rows_or_share(name, value)


def without_share(config: Any) -> Any:
    """Return a config with one group of rows if ``frequent_rows`` is a share of the lookups.

    Only data can turn the share into a number of rows.
    """
    share = getattr(config, "frequent_rows", None)
    return replace(config, frequent_rows=None) if isinstance(share, float) else config


def why_no_row_groups(config: Any, model: nn.Module) -> str | None:
    """Return why ``frequent_rows`` of an IPQConfig has no effect on a model, or None."""
    if getattr(config, "frequent_rows", None) is None:
        return None
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    stages = config.stage_groups({layer.group for layer in layers})
    if any(layer.input_table and stage_of(layer, stages) is not False for layer in layers):
        return None
    if tables := _input_tables(model):
        return f"the table of token ids ({', '.join(tables)}) is not packed"
    return f"{type(model).__name__} has no table of token ids"


def warn_without_row_groups(config: Any, model: nn.Module) -> None:
    """Warn once if ``frequent_rows`` of an IPQConfig has no effect on a model."""
    if (reason := why_no_row_groups(config, model)) is not None:
        instead = "set frequent_rows=None"
        if _input_tables(model):
            instead = f"select it with target_modules, exclude_modules and stages, or {instead}"
        logger.warning_once(f"frequent_rows has no effect: {reason}; {instead}")


def _input_tables(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model) if layer.input_table]


def in_row_groups(
    settings: dict[str, Any], layer: Any, frequent_rows: Any, rare_block_size: int | None
) -> dict[str, Any]:
    """Return the settings of a product quantizer, for a layer in groups of rows if it has them.

    Only tables of token ids have them, if not all of their rows are frequent.
    """
    if frequent_rows is None or rare_block_size is None or not layer.input_table:
        return settings
    if not is_int(frequent_rows):
        raise invalid(
            "frequent_rows",
            frequent_rows,
            "a number of rows, since a share of the lookups depends on data; pass a number "
            "(frequent_rows=8000), or use quantize_model(..., calibration_data=[...]) or a trainer",
        )
    if frequent_rows >= layer.rows:
        return settings
    shared = {key: settings[key] for key in settings if key not in ("scheme", "block_size")}
    return {
        "scheme": "row_groups",
        "group_rows": [frequent_rows, layer.rows - frequent_rows],
        "block_sizes": [settings["block_size"], rare_block_size],
        "n_codebooks": 2 if settings["scheme"] == "additive" else 1,
        **shared,
    }


def of_two_groups(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that give a layer these settings, if they have row groups."""
    if settings["scheme"] != "row_groups":
        return settings
    if len(settings["block_sizes"]) != 2:
        raise ValueError(
            f"invalid layer_quantizers[{name!r}]: noise has two groups of rows, and this layer "
            f"{len(settings['block_sizes'])}; use two groups, or write a QuantNoiseConfig without "
            "matching"
        )
    block_size, rare = settings["block_sizes"]
    own = {"block_size": block_size, "rare_block_size": rare}
    return {**settings, **own, "frequent_rows": settings["group_rows"][0]}
