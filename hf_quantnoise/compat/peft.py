"""Changes to PEFT, made when it is imported, and whether it changed a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from torch import nn

from ..deferred_imports import call_after_import


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


def has_adapters(model: nn.Module) -> bool:
    """Return whether PEFT has wrapped a model, or some of its layers."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())
