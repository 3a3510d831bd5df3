"""Subclasses created at run time: a module object stays the same and its class is replaced.

Subclasses keep their behaviour, ``isinstance`` holds; :func:`change_class` to the original class
undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from .compat import bind_hooked_forward

Maker = Callable[[type[nn.Module]], type[nn.Module]]

if TYPE_CHECKING:

    class _Module(nn.Module):
        """The module that the mixin becomes part of; its attributes depend on the layer."""

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

else:
    _Module = object


class DynamicSubclass(_Module):
    """Mixin of every class created by :func:`make_dynamic_subclass`."""

    original_class: ClassVar[type[nn.Module]]  # the class it was made from
    _maker: ClassVar[Maker]

    def __reduce_ex__(self, protocol):
        # pickle cannot find the class by name, so it calls the maker again.
        return _empty, (type(self)._maker, self.original_class), self.__getstate__()


def make_dynamic_subclass(
    prefix: str, cls: type[nn.Module], bases: tuple[type, ...], maker: Maker, **attributes: Any
) -> type[nn.Module]:
    """Create a subclass of a module class, with ``prefix`` before its name.

    ``bases`` begin with a :class:`DynamicSubclass`. ``maker`` is the cached function from the
    original class to this one, importable by name.
    """
    attributes = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "original_class": cls,
        "_maker": staticmethod(maker),
        **attributes,
    }
    return type(f"{prefix}{cls.__name__}", bases, attributes)


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, in place, also for the hooks that accelerate has added to it."""
    before = type(module)
    module.__class__ = cls
    bind_hooked_forward(module, before)


def _empty(maker: Maker, cls: type[nn.Module]) -> nn.Module:
    made = maker(cls)
    return made.__new__(made)
