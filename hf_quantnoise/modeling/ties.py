"""Tied weights under their packed names, so that transformers ties and saves them as ever."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel


def _renamed(ties: dict[str, str], packed: dict[str, list[str]]) -> dict[str, str]:
    """``{"a.weight": "b.weight"}`` -> ``{"a.weight_indices": "b.weight_indices", ...}``."""
    renamed = {}
    for target, source in ties.items():
        tensors = packed.get(target)
        if tensors is None or source not in packed:
            renamed[target] = source
            continue
        for name in tensors:
            renamed[target.removesuffix("weight") + name] = source.removesuffix("weight") + name
    return renamed


_MAP = "_tied_weights_keys"
# Where a module keeps the map that its own __init__ gave it (Marian's), if it did.
_OWN_MAP = "_quant_noise_own_ties"


def restore_ties(model: PreTrainedModel) -> None:
    """Gives a model and its sub-models the tie maps of the dense model back, once it is one."""
    submodels = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for module in submodels:
        module.__dict__.pop(_MAP, None)
        module.__dict__.update(module.__dict__.pop(_OWN_MAP, {}))
    for module in submodels:
        module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


class TieRewriter:
    """Rewrites a model's tie maps from ``weight`` to the tensors of packed layers.

    The maps must be read before any layer is packed: transformers expands its patterns against the
    names of the parameters, which are others afterwards. So: make this, pack, call :meth:`rewrite`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._maps = [
            (prefix, module, module.get_expanded_tied_weights_keys(all_submodels=False))
            for prefix, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, PreTrainedModel)
        ]

    def rewrite(self, tensors_of: dict[str, Iterable[str]]) -> None:
        """Sets the maps of the model and its sub-models.

        Args:
            tensors_of: layer name -> names of its packed tensors (``weight_indices``, ...).
        """
        for prefix, module, ties in self._maps:
            own = {key: value for key, value in vars(module).items() if key == _MAP}
            module.__dict__.setdefault(_OWN_MAP, own)  # later stages find it renamed
            start = f"{prefix}." if prefix else ""
            packed = {
                f"{name.removeprefix(start)}.weight": list(tensors)
                for name, tensors in tensors_of.items()
                if name.startswith(start)
            }
            renamed = _renamed(ties, packed)
            if renamed != ties:
                module._tied_weights_keys = renamed  # on the instance; the class keeps its own
            module.all_tied_weights_keys = _renamed(module.all_tied_weights_keys, packed)
