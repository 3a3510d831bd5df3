"""What all processes of a run must agree on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several of a run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank_0() -> bool:
    """Whether this process speaks for the run."""
    return not is_distributed() or dist.get_rank() == 0


def object_of_rank_0(value: Any) -> Any:
    """Rank 0's picklable object, on every rank of a distributed run."""
    if not is_distributed():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks of a distributed run; in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def of_rank(tensor: Tensor, rank: int) -> Tensor:
    """One rank's tensor, on every rank of a distributed run."""
    if not is_distributed():
        return tensor
    device = tensor.device
    if dist.get_backend() == "nccl" and device.type == "cpu":
        device = torch.device("cuda", torch.cuda.current_device())
    shared = tensor.to(device).contiguous()
    dist.broadcast(shared, src=rank)
    return shared.to(tensor.device)


def of_rank_0(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank of a distributed run."""
    return of_rank(tensor, 0)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 keeps in parts on several ranks (a ``DTensor``), put together; any other
    as it is. All ranks must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def put_into(tensor: Tensor, values: Tensor) -> None:
    """Copies values into a tensor, or each rank's part of them into what it has of one; in place.
    All ranks must do it."""
    if hasattr(tensor, "full_tensor"):
        values = split_like(tensor, values)
    tensor.copy_(values)


def split_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Values in parts, as FSDP2 keeps a tensor of the same shape. All ranks must ask for them."""
    from torch.distributed.tensor import distribute_tensor

    values = values.detach().to(tensor.to_local().device)
    return distribute_tensor(values, tensor.device_mesh, tensor.placements)


def owner_of(number: int) -> int:
    """The rank that does the n-th of several pieces of work, which go round."""
    return number % dist.get_world_size() if is_distributed() else 0


def is_mine(number: int) -> bool:
    """Whether this rank does the n-th piece."""
    return not is_distributed() or dist.get_rank() == owner_of(number)
