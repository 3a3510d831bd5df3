"""What all processes of a run must agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def of_rank_0(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank of a distributed run."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    device = tensor.device
    if dist.get_backend() == "nccl" and device.type == "cpu":
        device = torch.device("cuda", torch.cuda.current_device())
    shared = tensor.to(device).contiguous()
    dist.broadcast(shared, src=0)
    return shared.to(tensor.device)
