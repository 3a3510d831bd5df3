"""Adjacent layers that share their weights in chunks (section 7.9).

Sharing is of Parameters, not of modules: each layer keeps its own place in a cache, its own buffers
and its own names in the ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .structure import find_stacks

ShareLayers: TypeAlias = int | list[list[str]]
Chunk: TypeAlias = tuple[str, ...]


def chunks_of(model: nn.Module, share_layers: ShareLayers) -> list[Chunk]:
    """The chunks of layers that share their weights.

    Args:
        model: any model.
        share_layers: n cuts every stack into chunks of n layers (the last may be shorter); a list
            names the layers of each chunk, for models without stacks (EfficientNet, section 7.6).

    Returns:
        The layer names of each chunk, bottom-up; chunks of one layer too where n was given.

    Raises:
        ValueError: if the model has no stack, a name is none of its modules, or the layers of a
            chunk are of other classes or shapes than its first.
    """
    if isinstance(share_layers, int):
        stacks = find_stacks(model)
        if not stacks and share_layers > 1:
            raise ValueError(
                f"share_layers={share_layers!r}: {type(model).__name__} has no stack of two or "
                "more like layers; name the layers of each chunk: [['blocks.1', 'blocks.2'], ...]"
            )
        cut = [
            tuple(stack[start : start + share_layers])
            for stack in stacks
            for start in range(0, len(stack), share_layers)
        ]
    else:
        cut = [tuple(chunk) for chunk in share_layers]
    modules = dict(model.named_modules())
    for name in (name for chunk in cut for name in chunk):
        if name not in modules:
            raise ValueError(f"share_layers: {type(model).__name__} has no layer {name!r}")
    for chunk in cut:
        _require_alike(chunk, modules)
    return cut


def _require_alike(chunk: Chunk, modules: dict[str, nn.Module]) -> None:
    first = modules[chunk[0]]
    for name in chunk[1:]:
        odd = [
            f"{key} ({tuple(theirs.shape)} and {tuple(own.shape)})"
            for key, _, _, own, theirs in _in_both(modules[name], first)
            if (own.shape, own.dtype) != (theirs.shape, theirs.dtype)
        ]
        if type(modules[name]) is not type(first):
            odd = [f"class ({type(first).__name__} and {type(modules[name]).__name__})"]
        if odd:
            raise ValueError(
                f"share_layers: {name} cannot share the weights of {chunk[0]}, they differ in "
                f"{', '.join(odd[:3])}; name chunks of like layers: [['blocks.1', 'blocks.2'], ...]"
            )


def _in_both(
    layer: nn.Module, source: nn.Module
) -> list[tuple[str, nn.Module, str, nn.Parameter, nn.Parameter]]:
    """(name, owner, name in the owner, parameter, the source's) of every parameter of a layer that
    its source has too. A first layer may have more (T5's position bias) or less (a norm)."""
    theirs = dict(source.named_parameters(remove_duplicate=False))
    found = []
    for name, own in layer.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if name in theirs:
            found.append((name, layer.get_submodule(owner), leaf, own, theirs[name]))
    return found


def tensors_in_both(layer: nn.Module, source: nn.Module) -> list[str]:
    """Names, in the layer, of the parameters that it can share with its source."""
    return [name for name, *_ in _in_both(layer, source)]


def sources_of(chunks: Sequence[Chunk]) -> dict[str, str]:
    """Layer -> the layer whose weights it holds, for all but the first of each chunk."""
    return {name: chunk[0] for chunk in chunks for name in chunk[1:]}


def share(model: nn.Module, chunks: Sequence[Chunk]) -> None:
    """Gives the layers of each chunk the Parameters of its first, in place."""
    for name, source in sources_of(chunks).items():
        for _, owner, leaf, _, theirs in _in_both(_at(model, name), _at(model, source)):
            owner.register_parameter(leaf, theirs)


@torch.no_grad()
def unshare(model: nn.Module, shared_layers: Mapping[str, str]) -> None:
    """Gives layers copies of their own of the Parameters they share, in place.

    Args:
        model: the model.
        shared_layers: layer -> the layer whose weights it holds.
    """
    for name, source in shared_layers.items():
        for _, owner, leaf, own, _ in _in_both(_at(model, name), _at(model, source)):
            owner.register_parameter(leaf, nn.Parameter(own.detach().clone(), own.requires_grad))


def _at(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


class LayerSharing:
    """Sharing while a model is trained, which can be taken back.

    The ``state_dict`` gives each layer tensors of its own, so that checkpoints are those of a model
    without sharing and load as such.

    Args:
        model: the model, shared in place.
        chunks: from :func:`chunks_of`.
    """

    def __init__(self, model: nn.Module, chunks: Sequence[Chunk]) -> None:
        self.chunks = list(chunks)
        self._own: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._released = False
        layers = []
        for name, source in sources_of(self.chunks).items():
            layers.append(_at(model, name))
            both = _in_both(layers[-1], _at(model, source))
            self._own += [(owner, leaf, own) for _, owner, leaf, own, _ in both]
        share(model, self.chunks)
        self._hooks = [layer.register_state_dict_post_hook(_own_tensors) for layer in layers]

    def release(self) -> None:
        """Forgets the values that the layers had before they shared."""
        self._released = True
        for _, _, parameter in self._own:
            parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def undo(self) -> None:
        """Gives every layer its own Parameters back: with the shared values once these are the
        model's (after :meth:`release`), as they were before that."""
        for hook in self._hooks:
            hook.remove()
        for owner, leaf, parameter in self._own:
            shared = owner._parameters[leaf]
            if self._released:
                parameter.data = shared.detach().clone()
                parameter.grad = None
                parameter.requires_grad_(shared.requires_grad)
            owner.register_parameter(leaf, parameter)


def _own_tensors(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name, tensor in state_dict.items():
        # With keep_vars a caller asks for the very Parameters.
        is_value = isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
        if is_value and name.startswith(prefix):
            state_dict[name] = tensor.clone()
