"""Errors of a config that does not fit the layers of a model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..configuration import QuantizedModelConfig
from ..structure import GROUPS, LayerInfo, stage_of


def hint(name: str, known: list[str]) -> str:
    """Return the end of an error about an unknown name."""
    if close := difflib.get_close_matches(name, known, n=1):
        return f". Did you mean {close[0]!r}?"
    layers = [entry for entry in known if entry not in GROUPS]
    return f"; the model has {', '.join(layers[:4])}, ..."


def matches_no_layer(
    stage: str | None, stages: Sequence[str | None], layers: Sequence[LayerInfo]
) -> ValueError:
    """Return the error of a stage without layers."""
    taken = [layer for layer in layers if stage_of(layer, [stage]) == stage]
    if taken:
        others = ", ".join(sorted({repr(stage_of(layer, stages)) for layer in taken}))
        return ValueError(
            f"invalid stages={stages!r}: every layer of {stage!r} is in {others} (a regex takes "
            "precedence over a group, the first regex over later ones); remove "
            f"{stage!r}, or use a regex that matches fewer layers"
        )
    reason = f"its groups are {sorted({layer.group for layer in layers})}"
    return ValueError(f"invalid stages: {stage!r} matches no layer of the model; {reason}")


def nothing_fits(
    config: QuantizedModelConfig, what: str, members: Sequence[LayerInfo], skipped: dict[str, str]
) -> ValueError:
    """Return the error of a stage, or a model, none of whose layers can be packed."""
    widths = sorted({layer.columns for layer in members})
    settings = config.quantizer_settings(members[0]) or vars(config)
    setting = next(key for key in ("block_size", "block_sizes", "bits") if key in settings)
    reasons = "; ".join(f"{layer.name}: {skipped[layer.name]}" for layer in members[:3])
    return ValueError(
        f"invalid {setting}={settings[setting]!r}: none of the {len(members)} layers of {what} "
        f"can be packed ({reasons}), which have {widths} columns; choose a block_size that "
        "divides them, fewer n_centroids, or other stages"
    )
