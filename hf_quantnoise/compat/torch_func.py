"""Whether operations run in a graph, in ``torch.func``, or in forward-mode differentiation."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_graph() -> bool:
    """Return whether operations are recorded, for any number of inputs and other machines."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def in_torch_func() -> bool:
    """Return whether code runs inside ``vmap``, ``grad`` or another transformation."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def records_tangents() -> bool:
    """Return whether code runs in forward-mode differentiation, which ``no_grad`` does not end."""
    return forward_ad._current_level >= 0
