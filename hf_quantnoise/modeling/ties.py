"""Tied weights under the names of their packed tensors, for transformers to tie and save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from ..compat import TIED_WEIGHTS
from .convert import packed_names

# Where a module keeps the map that its own __init__ has set (Marian's), if it did.
_ORIGINAL_MAP = "_quant_noise_original_ties"


def submodels(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the model and the models in it, each after the prefix of the names of its layers."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PreTrainedModel):
            yield f"{name}." if name else "", module


@contextmanager
def renamed_ties(model: PreTrainedModel, names: Iterable[str]) -> Iterator[None]:
    """Rename the ties of layers that are packed in this context from ``weight`` to their tensors.

    transformers expands the patterns of its maps against parameter names, which packing changes.
    """
    maps = [
        (prefix, module, module.get_expanded_tied_weights_keys(all_submodels=False))
        for prefix, module in submodels(model)
    ]
    yield
    tensors = {f"{name}.weight": packed_names(model.get_submodule(name)) for name in names}
    for prefix, module, ties in maps:
        original = {key: value for key, value in vars(module).items() if key == TIED_WEIGHTS}
        module.__dict__.setdefault(_ORIGINAL_MAP, original)  # later stages see a renamed map
        packed = {
            name.removeprefix(prefix): keys
            for name, keys in tensors.items()
            if name.startswith(prefix)
        }
        renamed = _rename(ties, packed)
        if renamed != ties:
            setattr(module, TIED_WEIGHTS, renamed)  # on the instance; the class keeps its own
        module.all_tied_weights_keys = _rename(getattr(module, "all_tied_weights_keys", {}), packed)


def restore_ties(model: PreTrainedModel) -> None:
    """Restore the tie maps of the dense model, after it was dequantized."""
    modules = dict.fromkeys(module for _, module in submodels(model))
    for module in modules:
        module.__dict__.pop(TIED_WEIGHTS, None)
        module.__dict__.update(module.__dict__.pop(_ORIGINAL_MAP, {}))
    for module in modules:
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
