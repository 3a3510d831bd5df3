"""What all processes of a run must agree on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable object, on every rank of a distributed run."""
    if not is_distributed():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks of a distributed run; in place."""
    return _reduced(tensor, "SUM")


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The largest of each number over the ranks of a distributed run; in place."""
    return _reduced(tensor, "MAX")


def widest_over_ranks(
    ranges: Sequence[tuple[Tensor, Tensor] | None], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Of each range (low, high), scalars, the widest over the ranks of a distributed run, on a
    device; None where this rank knows none, (inf, -inf) where none does. On all ranks, each with
    as many ranges."""
    if not ranges:
        return []
    nothing = torch.tensor(math.inf), torch.tensor(-math.inf)
    known = [nothing if own is None else own for own in ranges]
    low, high = (torch.stack([own[end].to(device) for own in known]) for end in (0, 1))
    low, high = max_over_ranks(torch.stack([-low, high]))
    # Copies: tensors of a checkpoint may not share memory.
    return [(-low[place], high[place].clone()) for place in range(len(ranges))]


def _reduced(tensor: Tensor, operation: str) -> Tensor:
    if not is_distributed():
        return tensor
    shared = _on_device_of_backend(tensor)
    dist.all_reduce(shared, op=getattr(dist.ReduceOp, operation))
    return tensor if shared is tensor else tensor.copy_(shared)


def _on_device_of_backend(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, where NCCL can reach it."""
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        tensor = tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor.contiguous()


def on_any_rank(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on at least one rank of a distributed run. On all ranks,
    each with as many flags."""
    if not flags:
        return []
    return max_over_ranks(torch.tensor(list(flags), dtype=torch.uint8)).bool().tolist()


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A context that every rank leaves with an error if one does: it would go on alone, or leave
    the others waiting for it. Nothing inside may wait for another rank.

    Raises:
        Exception: on a rank that raised, what it raised; on the others a ValueError with the same
            words where that was one, else a RuntimeError that names rank and error; of the first
            rank that raised.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    said = [(rank, *found) for rank, found in enumerate(_gathered(_words_of(own))) if found]
    if own is not None:
        raise own
    if said:
        rank, name, words = said[0]
        if name == ValueError.__name__:
            raise ValueError(words)
        raise RuntimeError(f"rank {rank} stopped with {name}: {words}")


def _words_of(error: Exception | None) -> tuple[str, str] | None:
    return None if error is None else (type(error).__name__, str(error))


def _gathered(value: Any) -> list[Any]:
    """The picklable objects of all ranks, in their order."""
    if not is_distributed():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_from(tensor: Tensor, rank: int) -> Tensor:
    """One rank's tensor, on every rank of a distributed run."""
    if not is_distributed():
        return tensor
    shared = _on_device_of_backend(tensor)
    dist.broadcast(shared, src=rank)
    return shared.to(tensor.device)


def broadcast_from_rank_0(tensor: Tensor) -> Tensor:
    """Rank 0's tensor, on every rank of a distributed run."""
    return broadcast_from(tensor, 0)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 keeps in parts on several ranks (a ``DTensor``), put together; any other
    as it is. All ranks must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_into(tensor: Tensor, values: Tensor) -> None:
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
