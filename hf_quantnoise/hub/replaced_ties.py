"""Ties of packed layers to a layer that was replaced by a dense one, a new head or table.

The class of a model ties them whatever they are; a layer that was replaced is tied no more.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from ..compat import TIED_WEIGHTS
from ..configuration import QuantizedModelConfig
from ..modeling.ties import submodels
from ..sharing import parents_of


def untie_replaced(model: PreTrainedModel, config: QuantizedModelConfig) -> None:
    """Remove ties of packed layers to skipped ones, from the plan and the model's maps, in place.

    Layers whose common source was replaced stay tied, to the first one of them.
    """
    first: dict[str, str] = {}
    for name, entry in config.plan.items():
        source = entry.get("tied_to")
        if source is not None and source not in config.plan:
            entry["tied_to"] = first.setdefault(source, name)
            if entry["tied_to"] == name:
                del entry["tied_to"]
    for prefix, module in submodels(model):
        ties = module.get_expanded_tied_weights_keys(all_submodels=False)
        if (untied := _without_replaced(ties, prefix, config)) != ties:
            setattr(module, TIED_WEIGHTS, untied)  # on the instance; the class keeps its own
        ties = getattr(module, "all_tied_weights_keys", {})
        module.all_tied_weights_keys = _without_replaced(ties, prefix, config)


def _without_replaced(
    ties: dict[str, str], prefix: str, config: QuantizedModelConfig
) -> dict[str, str]:
    """Return a map of ties, of names after the prefix, without those of packed to dense layers."""
    kept: dict[str, str] = {}
    first: dict[str, str] = {}
    for target, source in ties.items():
        (layer, _, leaf), (other, _, _) = target.rpartition("."), source.rpartition(".")
        names = prefix + layer, prefix + other
        is_packed, is_dense = (
            [name in of for name in names] for of in (config.plan, config.left_dense)
        )
        if not leaf.startswith("weight") or not config.shared_layers.keys().isdisjoint(
            parents_of(names[0])
        ):
            kept[target] = source
        elif all(is_dense):
            kept[f"{layer}.weight"] = f"{other}.weight"  # not their packed tensors
        elif is_packed[0] and is_dense[1]:
            if (root := first.setdefault(other, layer)) != layer:
                kept[target] = f"{root}.{leaf}"
        elif not (is_dense[0] and is_packed[1]):
            kept[target] = source
    return kept
