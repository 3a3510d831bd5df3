"""What changes the layers themselves, before any is packed: pruning and sharing (section 7.9)."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ..configuration import QuantizedModelConfig
from ..pruning import Pruning, layers_to_prune, plan_pruning
from ..sharing import Chunk, chunks_of, share, sources_of, tensors_in_both
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
            self.pruning.carry_out(model)
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


def declare_shared(model: PreTrainedModel, shared_layers: dict[str, str]) -> None:
    """Tells transformers which tensors are one, under the names they have now: it then stores them
    once and ties them after loading.

    Args:
        model: the model, packed wholly, in part or not at all.
        shared_layers: layer -> the layer whose weights it holds.
    """
    for prefix, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        start = f"{prefix}." if prefix else ""
        own = {
            name.removeprefix(start): source.removeprefix(start)
            for name, source in shared_layers.items()
            if name.startswith(start) and source.startswith(start)
        }
        ties = {
            f"{name}.{tensor}": f"{source}.{tensor}"
            for name, source in own.items()
            for tensor in tensors_in_both(module.get_submodule(name), module.get_submodule(source))
            if tensor.rpartition(".")[2] not in INPUT_NAMES  # layers read different inputs
        }
        if ties:
            for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
                old = {
                    target: source
                    for target, source in (getattr(module, attribute, None) or {}).items()
                    if not any(target.startswith(f"{name}.") for name in own)
                }
                setattr(module, attribute, {**old, **ties})
