"""Imports that wait until they are needed, so that importing the package costs little."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazy_exports(
    package: str, modules: Mapping[str, Sequence[str]], **deprecated: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Each name is imported when it is used for the first time.

    Args:
        package: name of the package.
        modules: module of the package, without the package's name -> the names that it defines.
        deprecated: name -> its module; ``__dir__`` omits these names.
    """
    listed = {name: module for module, names in modules.items() for name in names}
    module_of = listed | deprecated

    def get_attribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *listed})

    return get_attribute, directory


def call_after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call a function with a module: at once if it has been imported, else when it is."""
    if name in sys.modules:
        function(sys.modules[name])
        return

    class Finder(MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
            if fullname != name:
                return None
            sys.meta_path.remove(self)
            spec: Any = find_spec(name)
            if spec is None or spec.loader is None:
                return None
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                try:
                    execute(module)
                except BaseException:
                    sys.meta_path.insert(0, self)  # it may be imported again
                    raise
                function(module)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
