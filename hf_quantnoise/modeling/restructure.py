"""What changes the layers themselves, before any is packed: pruning and sharing (section 7.9)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..configuration import QuantizedModelConfig
from ..pruning import Pruning, layers_to_prune, plan_pruning
from ..sharing import Chunk, chunks_of, share, sources_of, tensors_in_both
from .convert import is_packed
from .copies import copy_without_tensors
from .packed import INPUT_NAMES


@dataclass(frozen=True)
class Restructuring:
    """What a config does to the layers of a model, found out before the model is touched.

    Attributes:
        pruned_layers: name of each layer taken out -> weights it has.
        pruning: how, or None.
        chunks: the chunks of layers that share their weights, by their names afterwards.
    """

    pruned_layers: dict[str, int]
    pruning: Pruning | None
    chunks: list[Chunk]

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.pruning is not None or bool(sources_of(self.chunks))

    def carry_out(self, model: PreTrainedModel, config: QuantizedModelConfig) -> None:
        """Changes the model in place, and fills ``shared_layers`` and ``pruned_layers``."""
        if self.pruning is not None:
            self.pruning.apply(model)
        share(model, self.chunks)
        config.pruned_layers, config.shared_layers = self.pruned_layers, sources_of(self.chunks)


def plan_restructuring(model: PreTrainedModel, config: QuantizedModelConfig) -> Restructuring:
    """Which layers of a dense model are taken out and which share weights, by a config.

    Raises:
        ValueError: if the model has no such layers, or no config could describe what is left.
    """
    chunks = chunks_of(model, 1 if config.share_layers is None else config.share_layers)
    if config.prune_layers is None:
        return Restructuring({}, None, chunks)
    gone = layers_to_prune(model, config.prune_layers, chunks)
    pruning = plan_pruning(model, gone)
    weights = {
        name: sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
        for name in gone
    }
    kept = [[name for name in chunk if name not in gone] for chunk in chunks]
    renamed = [tuple(pruning.renamed.get(name, name) for name in chunk) for chunk in kept if chunk]
    return Restructuring(weights, pruning, renamed)


def restructured_copy(
    model: PreTrainedModel,
    config: QuantizedModelConfig,
    restructuring: Restructuring | None = None,
) -> PreTrainedModel:
    """The model as it will be packed, with layers taken out and shared, holding the very same
    tensors; the model itself is left as it is.

    Args:
        model: a dense model.
        config: says what.
        restructuring: what :func:`plan_restructuring` found, where that was done already.

    Raises:
        ValueError: as :func:`plan_restructuring`.
    """
    copy = copy_without_tensors(model)
    restructuring = restructuring or plan_restructuring(copy, config)
    restructuring.carry_out(copy, replace(config))
    return copy


def tied_late(model: PreTrainedModel, shared_layers: dict[str, str]) -> list[str]:
    """Tensors of shared layers that transformers must not tie while it loads: those of dense
    ``Conv1D``, whose biases it would cut to the length of their inputs (``_adjust_bias``)."""
    names = [
        f"{name}.{tensor}"
        for name, source in shared_layers.items()
        for tensor in _shared_tensors(model, name, source)
    ]
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return [
        name for name in names if isinstance(owners[name], Conv1D) and not is_packed(owners[name])
    ]


def _shared_tensors(model: PreTrainedModel, name: str, source: str) -> list[str]:
    tensors = tensors_in_both(model.get_submodule(name), model.get_submodule(source))
    # Layers of one weight read different inputs.
    return [tensor for tensor in tensors if tensor.rpartition(".")[2] not in INPUT_NAMES]


def declare_shared(
    model: PreTrainedModel, shared_layers: dict[str, str], without: Collection[str] = ()
) -> None:
    """Tells transformers which tensors are one, under the names they have now: it then stores them
    once and ties them after loading.

    Args:
        model: the model, packed wholly, in part or not at all.
        shared_layers: layer -> the layer whose weights it holds.
        without: full names of tensors to leave out.
    """
    if not shared_layers:
        return
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        start = f"{prefix}." if prefix else ""
        own = {
            name.removeprefix(start): source.removeprefix(start)
            for name, source in shared_layers.items()
            if name.startswith(start) and source.startswith(start)
        }
        if not own:
            continue
        ties = {
            f"{name}.{tensor}": f"{source}.{tensor}"
            for name, source in own.items()
            for tensor in _shared_tensors(module, name, source)
            if f"{start}{name}.{tensor}" not in without
        }
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            old = {
                target: source
                for target, source in (getattr(module, attribute, None) or {}).items()
                if not any(target.startswith(f"{name}.") for name in own)
            }
            setattr(module, attribute, {**old, **ties})
