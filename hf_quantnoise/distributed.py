"""What all processes of a run must agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several of a run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks of a distributed run; in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def of_rank_0(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank of a distributed run."""
    if not is_distributed():
        return tensor
    device = tensor.device
    if dist.get_backend() == "nccl" and device.type == "cpu":
        device = torch.device("cuda", torch.cuda.current_device())
    shared = tensor.to(device).contiguous()
    dist.broadcast(shared, src=0)
    return shared.to(tensor.device)
