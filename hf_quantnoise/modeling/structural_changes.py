"""Changes to the layers themselves, before any is packed: pruning and sharing (section 7.9)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..compat import TIED_WEIGHTS
from ..configuration import QuantizedModelConfig
from ..pruning import Pruning, layers_to_prune, plan_pruning
from ..sharing import Chunk, chunks_of, common_parameters, parents_of, share, sources_of
from .convert import is_packed
from .model_copies import copy_sharing_tensors
from .packed import INPUT_NAMES
from .ties import submodels


@dataclass(frozen=True)
class StructuralChanges:
    """The layers that a config prunes and shares, determined before the model is changed.

    It is false if there is nothing to change.
    """

    pruned_layers: dict[str, int]  # name -> number of weights
    pruning: Pruning | None
    chunks: list[Chunk]  # the layers that share their weights, by their names after pruning

    def __bool__(self) -> bool:
        return self.pruning is not None or bool(sources_of(self.chunks))

    def apply(self, model: PreTrainedModel, config: QuantizedModelConfig) -> None:
        """Change the model in place, and set the config's ``shared_layers``, ``pruned_layers``."""
        if self.pruning is not None:
            self.pruning.apply(model)
        share(model, self.chunks)
        config.pruned_layers, config.shared_layers = self.pruned_layers, sources_of(self.chunks)


def plan_structural_changes(
    model: PreTrainedModel, config: QuantizedModelConfig
) -> StructuralChanges:
    """Return the layers of a dense model that a config prunes and shares."""
    chunks = chunks_of(model, 1 if config.share_layers is None else config.share_layers)
    if config.prune_layers is None:
        return StructuralChanges({}, None, chunks)
    pruned = layers_to_prune(model, config.prune_layers, chunks)
    pruning = plan_pruning(model, pruned)
    weights = {
        name: sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
        for name in pruned
    }
    kept = [[name for name in chunk if name not in pruned] for chunk in chunks]
    renamed = [tuple(pruning.renamed.get(name, name) for name in chunk) for chunk in kept if chunk]
    return StructuralChanges(weights, pruning, renamed)


def changed_copy(model: PreTrainedModel, config: QuantizedModelConfig) -> PreTrainedModel:
    """Return a pruned and shared copy of a dense model that holds the model's own tensors."""
    copy = copy_sharing_tensors(model)
    plan_structural_changes(copy, config).apply(copy, replace(config))
    return copy


def tied_after_loading(model: PreTrainedModel, shared_layers: dict[str, str]) -> list[str]:
    """Return the tensors of shared layers that transformers must not tie while it loads.

    These are those of a dense ``Conv1D``, whose bias ``_adjust_bias`` would cut to its input size.
    """
    untied = []
    for name, source in shared_layers.items():
        for tensor in _shared_tensors(model, name, source):
            full_name = f"{name}.{tensor}"
            owner = model.get_submodule(full_name.rpartition(".")[0])
            if isinstance(owner, Conv1D) and not is_packed(owner):
                untied.append(full_name)
    return untied


def _shared_tensors(model: PreTrainedModel, name: str, source: str) -> list[str]:
    tensors = common_parameters(model.get_submodule(name), model.get_submodule(source))
    # Layers that share a weight still read different inputs.
    return [tensor for tensor in tensors if tensor.rpartition(".")[2] not in INPUT_NAMES]


def declare_shared(
    model: PreTrainedModel, shared_layers: dict[str, str], without: Collection[str] = ()
) -> None:
    """Declare the tensors of shared layers as tied, so that transformers stores them once.

    ``without`` has full names of tensors that are not declared.
    """
    if not shared_layers:
        return
    for start, module in submodels(model):
        inside = {
            name.removeprefix(start): source.removeprefix(start)
            for name, source in shared_layers.items()
            if name.startswith(start) and source.startswith(start)
        }
        if not inside:
            continue
        ties = {
            f"{name}.{tensor}": f"{source}.{tensor}"
            for name, source in inside.items()
            for tensor in _shared_tensors(module, name, source)
            if f"{start}{name}.{tensor}" not in without
        }
        for attribute in (TIED_WEIGHTS, "all_tied_weights_keys"):
            others = {
                target: source
                for target, source in (getattr(module, attribute, None) or {}).items()
                if inside.keys().isdisjoint(parents_of(target))
            }
            setattr(module, attribute, {**others, **ties})
