"""Squeeze-and-excitation blocks, whose layers get no noise by default (section 7.8)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ..structure import LayerInfo

_GATE = re.compile(r"sigmoid|^AdaptiveAvgPool\dd$", re.IGNORECASE)


def squeeze_excitation_layers(model: nn.Module, layers: Sequence[LayerInfo]) -> set[str]:
    """Return the names of the layers inside squeeze-and-excitation blocks.

    Such a block computes one factor per channel. It is found by its form, in any model: it has just
    two layers, one from C features to fewer and one back to C, and a sigmoid or a global average
    pooling; and the module around it has a convolution with C output channels.

    Args:
        model: the model.
        layers: all of its layers, from ``find_layers``.
    """
    inside: dict[str, list[LayerInfo]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        for end in range(len(parts)):
            inside.setdefault(".".join(parts[:end]), []).append(layer)
    found: set[str] = set()
    for name, pair in inside.items():
        around = inside[name.rpartition(".")[0]]
        if name and len(pair) == 2 and len(around) > 2 and _is_bottleneck(*pair):
            channels = pair[1].rows
            feeds = [layer for layer in around if layer not in pair and layer.rows == channels]
            kinds = (type(module).__name__ for module in model.get_submodule(name).modules())
            if any(layer.layer_type.group == "conv" for layer in feeds) and any(
                map(_GATE.search, kinds)
            ):
                found.update(layer.name for layer in pair)
    return found


def _is_bottleneck(reduce: LayerInfo, expand: LayerInfo) -> bool:
    return reduce.rows == expand.columns < reduce.columns == expand.rows
