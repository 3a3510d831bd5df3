"""Transformations of ``torch.func``."""

from __future__ import annotations

import torch


def in_torch_func() -> bool:
    """Return whether code runs inside ``vmap``, ``grad`` or another transformation."""
    return torch._C._functorch.peek_interpreter_stack() is not None
