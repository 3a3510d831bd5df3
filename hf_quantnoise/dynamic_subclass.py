"""Classes made at run time out of a module's own class: the module object stays, its class changes.

Subclasses of layers keep what they add, ``isinstance`` holds, and the way back is one assignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

Maker = Callable[[type[nn.Module]], type[nn.Module]]


class DynamicSubclass:
    """Mixin of every class that :func:`make_dynamic_subclass` makes.

    Attributes:
        original_class: the original class.
    """

    original_class: ClassVar[type[nn.Module]]
    _maker: ClassVar[Maker]

    def __reduce_ex__(self, protocol):
        # pickle cannot find a class made at run time by name: it is made again.
        return _empty, (type(self)._maker, self.original_class), self.__getstate__()


def make_dynamic_subclass(
    prefix: str, cls: type[nn.Module], bases: tuple[type, ...], maker: Maker, **attributes: Any
) -> type[nn.Module]:
    """A class that stands in for another.

    Args:
        prefix: put before the name of the original.
        cls: the original class.
        bases: bases of the new class, a :class:`DynamicSubclass` first.
        maker: cached function from the original class to this one, found by name in its module.
        attributes: further attributes of the class.
    """
    own = {"original_class": cls, "_maker": staticmethod(maker)}
    known = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"{prefix}{cls.__name__}", bases, {**known, **own, **attributes})


def _empty(maker: Maker, cls: type[nn.Module]) -> nn.Module:
    made = maker(cls)
    return made.__new__(made)
