"""Weight sharing between chunks of adjacent layers (section 7.9).

Layers share Parameters, not modules: each layer keeps its index in a cache, its buffers and its
names in the ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .compat import own_parameters
from .structure import find_stacks

ShareLayers: TypeAlias = int | list[list[str]]
Chunk: TypeAlias = tuple[str, ...]


def chunks_of(model: nn.Module, share_layers: ShareLayers) -> list[Chunk]:
    """Return the layer names of each chunk, from the bottom, also of chunks of one layer.

    ``share_layers`` is the number of layers in a chunk (the last one of a stack may be shorter), or
    the layer names of each chunk, for models without stacks (EfficientNet, section 7.6).
    """
    if isinstance(share_layers, int):
        stacks = find_stacks(model)
        if not stacks and share_layers > 1:
            raise ValueError(
                f"invalid share_layers={share_layers!r}: {type(model).__name__} has no stack of "
                "two or more similar layers; name the layers of each chunk, e.g. "
                "[['blocks.1', 'blocks.2']]"
            )
        chunks = [
            tuple(stack[start : start + share_layers])
            for stack in stacks
            for start in range(0, len(stack), share_layers)
        ]
    else:
        chunks = [tuple(chunk) for chunk in share_layers]
    modules = dict(model.named_modules())
    for name in (name for chunk in chunks for name in chunk):
        if name not in modules:
            raise ValueError(
                f"invalid share_layers: {type(model).__name__} has no layer {name!r}; use names "
                "from model.named_modules()"
            )
    for name, source in sources_of(chunks).items():
        if different := difference(modules[name], modules[source]):
            raise ValueError(
                f"invalid share_layers: {name} cannot share the weights of {source}, they differ "
                f"in {different}; name chunks of similar layers: [['blocks.1', 'blocks.2'], ...]"
            )
    return chunks


def difference(layer: nn.Module, source: nn.Module) -> str:
    """Return in which class, shapes or dtypes layers differ, "" if they can share weights."""
    if type(layer) is not type(source):
        return f"class ({type(layer).__name__} and {type(source).__name__})"
    different = [
        f"{key} ({tuple(own.shape)} and {tuple(shared.shape)})"
        for key, (own, shared) in common_parameters(layer, source).items()
        if (own.shape, own.dtype) != (shared.shape, shared.dtype)
    ]
    return ", ".join(different[:3])


def common_parameters(
    layer: nn.Module, source: nn.Module
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return name -> (the layer's parameter, the source's parameter) of common parameters.

    A first layer may have additional parameters (T5's position bias) or fewer (a norm). The codes
    of packed layers are Parameters among the buffers.
    """
    shared, parameters = (
        {
            name: tensor
            for name, tensor in chain(
                module.named_parameters(remove_duplicate=False),
                module.named_buffers(remove_duplicate=False),
            )
            if isinstance(tensor, nn.Parameter)
        }
        for module in (source, layer)
    )
    return {name: (parameters[name], shared[name]) for name in parameters if name in shared}


def sources_of(chunks: Sequence[Chunk]) -> dict[str, str]:
    """Return layer -> the layer whose weights it shares, except for the first of each chunk."""
    return {name: chunk[0] for chunk in chunks for name in chunk[1:]}


def chunks_by_stack(stacks: Sequence[Sequence[str]], chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Return the chunks of each stack in order; a layer outside of ``chunks`` is one by itself.

    Chunks of layers outside of the stacks are omitted. One of several stacks is in that of its
    first layer.
    """
    stacked = {name for stack in stacks for name in stack}
    by_first = {chunk[0]: chunk for chunk in chunks if stacked.issuperset(chunk)}
    shared = {name for chunk in by_first.values() for name in chunk}
    return [
        [by_first.get(name, (name,)) for name in stack if name in by_first or name not in shared]
        for stack in stacks
    ]


def parents_of(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module or tensor: ``a.b.c`` -> ``a.b``, ``a``."""
    while name := name.rpartition(".")[0]:
        yield name


def _common_in_model(
    model: nn.Module, shared_layers: Mapping[str, str]
) -> Iterator[tuple[nn.Module, str, nn.Parameter, nn.Parameter]]:
    """Yield the owner and attribute of each parameter that can be shared, and both parameters."""
    for name, source in shared_layers.items():
        layer = model.get_submodule(name)
        common = common_parameters(layer, model.get_submodule(source))
        for key, (parameter, shared) in common.items():
            owner, _, leaf = key.rpartition(".")
            yield layer.get_submodule(owner), leaf, parameter, shared


def share(model: nn.Module, chunks: Sequence[Chunk]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Share the Parameters of the first layer of each chunk with its other layers, in place.

    Returns the owner, attribute and value of each Parameter that was replaced.
    """
    replaced = []
    for owner, leaf, parameter, shared in _common_in_model(model, sources_of(chunks)):
        owner.register_parameter(leaf, shared)
        replaced.append((owner, leaf, parameter))
    return replaced


@torch.no_grad()
def unshare(model: nn.Module, shared_layers: Mapping[str, str]) -> None:
    """Replace shared Parameters with copies, in place; see :func:`sources_of`."""
    for owner, leaf, parameter, _ in _common_in_model(model, shared_layers):
        copy = parameter.detach().clone()
        owner.register_parameter(leaf, nn.Parameter(copy, parameter.requires_grad))


class LayerSharing:
    """Weight sharing during training, which can be undone.

    The model is changed in place. The ``state_dict`` has separate tensors for each layer, so that
    checkpoints have the format of the model without sharing.
    """

    def __init__(self, model: nn.Module, chunks: Sequence[Chunk]) -> None:
        self.chunks = list(chunks)
        self._replaced = share(model, self.chunks)
        self._released = False
        layers = [model.get_submodule(name) for name in sources_of(self.chunks)]
        self._hooks = [layer.register_state_dict_post_hook(_copy_tensors) for layer in layers]

    def release(self) -> None:
        """Drop the values that the layers had before sharing."""
        self._released = True
        for _, _, parameter in self._replaced:
            parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the separate Parameters of each layer.

        After :meth:`release` they have the shared values, otherwise those from before sharing.
        """
        for hook in self._hooks:
            hook.remove()
        for owner, name, parameter in self._replaced:
            if self._released:
                shared = own_parameters(owner)[name]
                parameter.data = shared.detach().clone()
                parameter.grad = None
                parameter.requires_grad_(shared.requires_grad)
            owner.register_parameter(name, parameter)


def _copy_tensors(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name, tensor in state_dict.items():
        # keep_vars requests the Parameters themselves, which are not copied.
        is_value = isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
        if is_value and name.startswith(prefix):
            state_dict[name] = tensor.clone()
