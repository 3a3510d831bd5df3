"""Undo of everything that packing changes in a model, if it fails or is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..configuration import QuantizedModelConfig
from ..pruning import configs_in


class ModelSnapshot:
    """The modules and configs of a model, to be restored if its context is left by an error.

    Packing, pruning, sharing and the removal of noise replace parameters, and never write to those
    of the dense model. So tensors are not copied: a snapshot keeps the replaced ones in memory (the
    dense model, beside the codes) until its context ends or :meth:`release` is called. After that,
    an error leaves the model as it is. ``KeyboardInterrupt`` is undone like any other error.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [_Attributes(each) for each in _modules_and_configs(model)]

    def release(self) -> None:
        """Keep the model as it is from now on."""
        self._saved = []

    def __enter__(self) -> ModelSnapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            for attributes in self._saved:
                attributes.restore()
        self.release()


class _Attributes:
    """The class and the attributes of an object, with the items of its dicts, lists and sets."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.kind = owner, type(owner)
        self.values = dict(vars(owner))
        self.items = {
            name: copy(value)
            for name, value in self.values.items()
            if isinstance(value, dict | list | set)
        }

    def restore(self) -> None:
        if type(self.owner) is not self.kind:
            self.owner.__class__ = self.kind
        vars(self.owner).clear()
        vars(self.owner).update(self.values)
        for name, items in self.items.items():
            value = self.values[name]  # others may refer to it, as handles do to hooks
            value.clear()
            value.extend(items) if isinstance(value, list) else value.update(items)


def _modules_and_configs(model: nn.Module) -> Iterator[Any]:
    """Yield each module of a model, and each config that one of them has, once."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        yield module
        for value in vars(module).values():
            for config in configs_in(value) if isinstance(value, PreTrainedConfig) else ():
                seen[id(config)] = config
                plan = getattr(config, "quantization_config", None)  # it grows with each stage
                if isinstance(plan, QuantizedModelConfig):
                    seen[id(plan)] = plan
    yield from seen.values()
