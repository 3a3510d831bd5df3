"""Whether noise reaches its layers: some trainers read a weight without calling the layer."""

from __future__ import annotations

from functools import partial

from torch import nn

from .state import QuantNoiseState


class ReachCheck:
    """Watches which noised layers are called.

    Noise acts in a layer's forward. Code that takes ``layer.weight`` for a product of its own, like
    a fused loss that never makes the logits, goes past it.

    Args:
        state: the noise; its layers get a hook each until :meth:`close`.
    """

    def __init__(self, state: QuantNoiseState) -> None:
        self._called: set[str] = set()
        self._names = list(state.layers)
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._mark, name))
            for name, layer in state.layers.items()
        ]

    def _mark(self, name: str, layer: nn.Module, inputs: tuple) -> None:
        self._called.add(name)

    def close(self) -> list[str]:
        """Takes the hooks off; returns the names of the layers that were never called."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return [name for name in self._names if name not in self._called]
