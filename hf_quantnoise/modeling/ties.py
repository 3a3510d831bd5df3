"""Tied weights under the names of their packed tensors, for transformers to tie and save."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from ..compat import TIED_WEIGHTS

# Where a module keeps the map that its own __init__ has set (Marian's), if it did.
_ORIGINAL_MAP = "_quant_noise_original_ties"


class TieRewriter:
    """Rewrites a model's tie maps from ``weight`` to the tensors of packed layers.

    transformers expands the patterns of its maps against the names of the parameters, which change
    when a layer is packed. So create the rewriter first, then pack, then call :meth:`rewrite`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._maps = [
            (prefix, module, module.get_expanded_tied_weights_keys(all_submodels=False))
            for prefix, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, PreTrainedModel)
        ]

    def rewrite(self, tensors_of: dict[str, Iterable[str]]) -> None:
        """Set the maps, given layer name -> names of its packed tensors (``weight_indices``...)."""
        for prefix, module, ties in self._maps:
            original = {key: value for key, value in vars(module).items() if key == TIED_WEIGHTS}
            module.__dict__.setdefault(_ORIGINAL_MAP, original)  # later stages see a renamed map
            start = f"{prefix}." if prefix else ""
            packed = {
                f"{name.removeprefix(start)}.weight": list(tensors)
                for name, tensors in tensors_of.items()
                if name.startswith(start)
            }
            renamed = _rename(ties, packed)
            if renamed != ties:
                setattr(module, TIED_WEIGHTS, renamed)  # on the instance; the class keeps its own
            module.all_tied_weights_keys = _rename(module.all_tied_weights_keys, packed)


def restore_ties(model: PreTrainedModel) -> None:
    """Restore the tie maps of the dense model, after it was dequantized."""
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in submodels:
        module.__dict__.pop(TIED_WEIGHTS, None)
        module.__dict__.update(module.__dict__.pop(_ORIGINAL_MAP, {}))
    for module in submodels:
        module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def _rename(ties: dict[str, str], packed: dict[str, list[str]]) -> dict[str, str]:
    """``{"a.weight": "b.weight"}`` -> ``{"a.weight_indices": "b.weight_indices", ...}``."""
    renamed = {}
    for target, source in ties.items():
        if target not in packed or source not in packed:
            renamed[target] = source
            continue
        for name in packed[target]:
            renamed[target.removesuffix("weight") + name] = source.removesuffix("weight") + name
    return renamed
