"""Training under FSDP2: a copy of the model is sharded and trained, and its numbers are put back.

``fully_shard`` changes modules for good: class, hooks, and a state that holds their parameters.
Layers could not be packed there, nor models copied or saved layer by layer. So the trainer's own
model stays as it is, whole, on each rank; what is trained is a copy that is taken anew each time.

Not everything can be sharded. Packed layers are small and hold integers; scalars have no parts;
a weight of several layers would belong to several groups of them. Such parameters stay whole on
every rank ("replicated"), and their gradients are averaged as DDP would do it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend, convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import Trainer

from ...distributed import (
    broadcast_from_rank_0,
    broadcast_object,
    full_tensor,
    on_any_rank,
    split_like,
    sum_over_ranks,
)
from ...dynamic_subclass import DynamicSubclass
from ...modeling import packed_layers
from ...modeling.model_copies import copy_with_own_parameters
from ...noise import find_state

if TYPE_CHECKING:
    from accelerate import Accelerator


def require_fsdp2(trainer: Trainer) -> None:
    """Refuses what would be sharded otherwise than asked for, or not at all.

    Raises:
        ValueError: naming the field, and the way out.
    """
    if any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters()):
        raise ValueError(
            "the model's parameters are sharded already (distributed_config, tp_plan or "
            "fully_shard); load it without, and let the trainer shard it: TrainingArguments("
            "fsdp=True, fsdp_config={'version': 2})"
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "fsdp_config={'version': 1}: FSDP1 flattens the weights of several layers into one, "
            "and noise needs them one by one; set fsdp_config={'version': 2}"
        )
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if (trainer.args.fsdp or by_launcher) and not trainer.is_fsdp_enabled:
        asked = f"fsdp={trainer.args.fsdp!r}" if trainer.args.fsdp else "FSDP by accelerate launch"
        raise ValueError(
            f"{asked}: accelerate shards on GPUs and other accelerators, and on "
            f"{trainer.args.device} it would run DDP without a word; leave fsdp out there"
        )
    if not trainer.is_fsdp_enabled:
        return
    if trainer.accelerator.state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_config={'activation_checkpointing': True}: accelerate recomputes with other "
            "random numbers than those of the forward, so with other noise and other dropout; set "
            "gradient_checkpointing=True instead, which draws them again"
        )
    if is_compiled(trainer):
        raise ValueError(
            "torch_compile=True (or accelerate's dynamo_backend) does not go with fsdp yet; leave "
            "one of the two out (with DDP it does)"
        )


def is_compiled(trainer: Trainer) -> bool:
    """Whether a model is compiled to be trained: by ``torch_compile``, or by what ``accelerate
    launch --dynamo_backend`` or ``accelerate config`` say."""
    plugin = trainer.accelerator.state.dynamo_plugin
    return trainer.args.torch_compile or plugin.backend != DynamoBackend.NO


def share_what_rank_0_read(trainer: Trainer, *models: nn.Module) -> None:
    """Gives all ranks the models that only rank 0 has read (``cpu_ram_efficient_loading``, which
    ``accelerate config`` turns on): elsewhere ``from_pretrained`` leaves them without memory. What
    is loaded from then on is read by each rank, as each has the whole model. On all ranks."""
    if not trainer.is_fsdp_enabled:
        return
    for model in models:
        empty = any(tensor.is_meta for tensor in model.state_dict().values())
        if sum_over_ranks(torch.tensor(float(empty), device=trainer.args.device)) > 0:
            take_from_rank_0(model)
    trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


@torch.no_grad()
def take_from_rank_0(model: nn.Module) -> None:
    """Parameters and persistent buffers of rank 0 on all ranks, where a model may have no memory.
    What layers hold together they hold together afterwards."""
    taken: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
        values = broadcast_from_rank_0(own.detach())
        if not tensor.is_meta:
            tensor.copy_(values)
            continue
        if isinstance(tensor, nn.Parameter):
            values = nn.Parameter(values, tensor.requires_grad)
        holder, _, last = name.rpartition(".")
        module = model.get_submodule(holder)
        held = module._parameters if last in module._parameters else module._buffers
        held[last] = taken.setdefault(id(tensor), values)


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not sharded: those of packed layers, scalars, integers, and what
    several modules hold. accelerate shards a head together with the table it is tied to."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(module)
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    pair = {id(module) for module in ends}
    packed = {id(p) for _, layer in packed_layers(model) for p in layer.parameters()}

    def is_replicated(parameter: nn.Parameter) -> bool:
        if id(parameter) in packed or parameter.dim() == 0 or not parameter.is_floating_point():
            return True
        own = holders[id(parameter)]
        return len(own) > 1 and not {id(module) for module in own} <= pair

    return [parameter for parameter in model.parameters() if is_replicated(parameter)]


def units_to_shard(model: nn.Module, names: list[str] | None) -> list[str]:
    """Names of the classes whose modules are sharded one by one.

    Layers that may be skipped have a class of their own (``shadow.py``). accelerate (1.15) takes
    all of ``_no_split_modules`` where no names are given, and fails where one of them (BERT's
    embeddings) holds the table that it shards by itself.

    Args:
        model: the model.
        names: what was asked for; None takes the model's ``_no_split_modules``.
    """
    by_default = names is None
    names = list(getattr(model, "_no_split_modules", None) or ()) if by_default else names
    table = getattr(model, "get_input_embeddings", lambda: None)()
    found = {}
    for module in model.modules():
        original = module.original_class if isinstance(module, DynamicSubclass) else type(module)
        holds_table = by_default and any(each is table for each in module.modules())
        if original.__name__ in names and not holds_table:
            found[type(module).__name__] = original.__name__
    missing = set() if by_default else set(names) - set(found.values())
    return [*found, *sorted(missing)]  # accelerate refuses a class that is not there


class ShardedCopy:
    """A copy of a trainer's model to shard and to train.

    Args:
        model: the model; it keeps its numbers until they are put back.
        device: where the copy is trained.

    Attributes:
        original: the model.
        model: the copy.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.original = model
        self.model = copy_with_own_parameters(model)
        self._replicated = replicated_parameters(self.model)
        for tensor in self._replicated:
            tensor.data = tensor.data.to(device)

    @contextmanager
    def rules(self, accelerator: Accelerator) -> Iterator[None]:
        """A context in which accelerate knows what to shard; all trainers share one plugin.

        Half precision is autocast, as under DDP. FSDP2's own would gather rounded weights, for
        noise to look at, and would leave what is replicated in float32.
        """
        plugin = accelerator.state.fsdp_plugin
        changes = {
            "transformer_cls_names_to_wrap": units_to_shard(
                self.model, plugin.transformer_cls_names_to_wrap
            ),
            "ignored_modules": [nn.ParameterList(self._replicated)],
        }
        if accelerator.mixed_precision != "no":
            changes["mixed_precision_policy"] = None
            self.model.forward = _autocast(accelerator, self.model.forward)
        saved = {name: getattr(plugin, name) for name in changes}
        try:
            vars(plugin).update(changes)
            yield
        finally:
            vars(plugin).update(saved)

    def split_groups(self, groups: list[dict]) -> None:
        """Gives replicated parameters groups of their own in an optimizer, in place: one call for
        a whole group takes either kind."""
        own = {id(parameter) for parameter in self._replicated}
        for group in list(groups):
            kept = [p for p in group["params"] if id(p) in own]
            if kept and len(kept) < len(group["params"]):
                group["params"] = [p for p in group["params"] if id(p) not in own]
                groups.append({**group, "params": kept})

    def average_gradients(self) -> None:
        """The mean over the ranks of the gradients of replicated parameters; one that no rank has
        used has none, and an optimizer neither moves nor decays it. After the last backward of an
        optimizer step, on all ranks."""
        trained = [parameter for parameter in self._replicated if parameter.requires_grad]
        used = on_any_rank([parameter.grad is not None for parameter in trained])
        for parameter, is_used in zip(trained, used, strict=True):
            if not is_used:
                continue
            if parameter.grad is None:  # on this rank
                parameter.grad = torch.zeros_like(parameter)
            sum_over_ranks(parameter.grad).div_(torch.distributed.get_world_size())

    def spread_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives all ranks what rank 0 has of replicated parameters in an optimizer that was loaded:
        torch (2.13) leaves it out on the others. On all ranks."""
        for parameter in self._replicated:
            own = optimizer.state.get(parameter, {})
            shared = broadcast_object({key: _on_cpu(value) for key, value in own.items()})
            for key in shared.keys() - own.keys():
                optimizer.state[parameter][key] = like_state_of(parameter, shared[key])

    @torch.no_grad()
    def put_back(self) -> None:
        """Gives the original the copy's numbers, on all ranks; buffers are those of rank 0."""
        trained = dict(self.model.named_parameters())
        for name, parameter in self.original.named_parameters():
            parameter.copy_(full_tensor(trained[name]))
        buffers = dict(_persistent_buffers(self.model))
        for name, buffer in _persistent_buffers(self.original):
            buffer.copy_(broadcast_from_rank_0(buffers[name]))
        noise, own = find_state(self.model), find_state(self.original)
        if own is not None:
            own.load_state_dict(noise.state_dict())
            own.p = noise.p


def _autocast(accelerator: Accelerator, forward: Callable) -> Callable:
    @wraps(forward)
    def in_half_precision(*args, **kwargs):
        with accelerator.autocast():
            return forward(*args, **kwargs)

    return convert_outputs_to_fp32(in_half_precision)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def like_state_of(parameter: Tensor, value: Any) -> Any:
    """A copy of what an optimizer keeps of a parameter: where it is, in parts where it is."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    if hasattr(parameter, "full_tensor"):
        return split_like(parameter, value)
    return value.to(parameter.device, copy=True)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
