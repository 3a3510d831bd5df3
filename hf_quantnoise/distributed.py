"""Collectives of a distributed run. Without one, each function returns what a single rank would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank_0() -> bool:
    """Return whether this process is rank 0, or the only one."""
    return not is_distributed() or dist.get_rank() == 0


def require_one_gpu_per_process(n_gpu: int, setting: str) -> None:
    """Raise if a trainer uses several GPUs in one process, by ``nn.DataParallel``.

    Args:
        n_gpu: ``TrainingArguments.n_gpu``.
        setting: what this does not work with.

    Raises:
        ValueError: if ``n_gpu`` is above 1.
    """
    if n_gpu > 1:
        raise ValueError(
            f"invalid launch: got n_gpu={n_gpu} in one process, expected one GPU per process with "
            f"{setting}; start with torchrun --nproc-per-node {n_gpu}, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one GPU"
        )


def broadcast_object(value: Any) -> Any:
    """Return rank 0's picklable object on every rank."""
    if not is_distributed():
        return value
    objects = [value]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place."""
    return _all_reduce(tensor, "SUM")


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Take the elementwise maximum of a tensor over the ranks, in place."""
    return _all_reduce(tensor, "MAX")


def widest_over_ranks(
    ranges: Sequence[tuple[Tensor, Tensor] | None],
) -> list[tuple[Tensor, Tensor]]:
    """Return the union of each range (low, high) over the ranks, scalars on the CPU.

    Must be called on all ranks, with equally many ranges. A range is None if this rank has none; if
    no rank has one, the result is (inf, -inf).
    """
    if not ranges:
        return []
    empty = torch.tensor([math.inf, -math.inf], device="cpu").unbind()
    known = [empty if found is None else found for found in ranges]
    low, high = (torch.stack([found[end].cpu() for found in known]) for end in (0, 1))
    low, high = max_over_ranks(torch.stack([-low, high]))
    # Copies, because tensors of a checkpoint must not share memory.
    return [(-low[index], high[index].clone()) for index in range(len(ranges))]


def on_any_rank(flags: Sequence[bool]) -> list[bool]:
    """Return, for each flag, whether any rank sets it.

    Must be called on all ranks, with equally many flags.
    """
    if not flags:
        return []
    return (
        max_over_ranks(torch.tensor(list(flags), dtype=torch.uint8, device="cpu")).bool().tolist()
    )


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Average the gradients of parameters that every rank holds over the ranks.

    Parameters that no rank has used keep no gradient, so that the optimizer neither moves nor
    decays them. Call after the last backward of an optimizer step, on all ranks.
    """
    if not is_distributed():
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    used = on_any_rank([parameter.grad is not None for parameter in trained])
    for parameter, is_used in zip(trained, used, strict=True):
        if not is_used:
            continue
        if parameter.grad is None:  # on this rank
            parameter.grad = torch.zeros_like(parameter)
        sum_over_ranks(parameter.grad).div_(dist.get_world_size())


def _all_reduce(tensor: Tensor, operation: str) -> Tensor:
    if not is_distributed():
        return tensor
    reduced = _on_backend_device(tensor)
    dist.all_reduce(reduced, op=getattr(dist.ReduceOp, operation))
    return tensor if reduced is tensor else tensor.copy_(reduced)


def _on_backend_device(tensor: Tensor) -> Tensor:
    """Return the tensor, contiguous, on a device that NCCL can reach."""
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        tensor = tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor.contiguous()


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If any rank raises inside this context, raise on all ranks, so that none hangs.

    A rank that raised raises its own error. The others repeat that of the first rank that raised: a
    ValueError or TypeError with the same message, any other error as a RuntimeError that names rank
    and error.
    The code inside must not wait for another rank.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    errors: list[tuple[str, str] | None] = []
    if is_distributed():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if own is None else (type(own).__name__, str(own)))
    if own is not None:
        raise own
    for rank, (name, message) in ((rank, error) for rank, error in enumerate(errors) if error):
        for kind in (ValueError, TypeError):
            if name == kind.__name__:
                raise kind(message)
        raise RuntimeError(f"rank {rank} stopped with {name}: {message}")


def broadcast_from(tensor: Tensor, rank: int) -> Tensor:
    """Return one rank's tensor on every rank."""
    if not is_distributed():
        return tensor
    received = _on_backend_device(tensor)
    dist.broadcast(received, src=rank)
    return received.to(tensor.device)


def broadcast_from_rank_0(tensor: Tensor) -> Tensor:
    """Return rank 0's tensor on every rank."""
    return broadcast_from(tensor, 0)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of an FSDP2 shard (a ``DTensor``), or any other tensor unchanged.

    Must be called on all ranks.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor in place, or into each rank's shard of it.

    Must be called on all ranks.
    """
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        shard: Any = tensor
        values = values.to(shard.to_local().device)
        values = distribute_tensor(values, shard.device_mesh, shard.placements)
    tensor.copy_(values)


def rank_of_task(index: int) -> int:
    """Return the rank that does the given one of several tasks, which are assigned round-robin."""
    return index % dist.get_world_size() if is_distributed() else 0


def is_own_task(index: int) -> bool:
    """Return whether this rank does the given one of several tasks."""
    return not is_distributed() or dist.get_rank() == rank_of_task(index)
