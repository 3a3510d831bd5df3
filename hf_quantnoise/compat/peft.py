"""Changes to PEFT, made when it is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn


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
                execute(module)
                function(module)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())


def set_table_of_prompts(table_of: Callable[[Any], nn.Module | None]) -> None:
    """Let PEFT's prompt learning use the embedding table that a function returns for a model.

    PEFT looks for a parameter of as many rows as the vocabulary, and takes its name without
    ".weight" for that of the table. A packed table has no such parameter.
    """

    def patch(module: ModuleType) -> None:
        original = module.PeftModel._setup_prompt_encoder

        @wraps(original)
        def setup(self: Any, adapter_name: str) -> None:
            model, table = self.base_model, table_of(self.base_model)
            if table is None:
                return original(self, adapter_name)
            regular = model.get_submodule
            first = "embeddings.word_embeddings"  # what PEFT tries before it searches
            model.get_submodule = lambda name: table if name == first else regular(name)
            try:
                return original(self, adapter_name)
            finally:
                del model.get_submodule

        module.PeftModel._setup_prompt_encoder = setup

    call_after_import("peft.peft_model", patch)
