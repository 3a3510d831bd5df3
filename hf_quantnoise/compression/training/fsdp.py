"""Training under FSDP2: a copy of the model is sharded and trained, its weights are copied back.

``fully_shard`` changes modules permanently: their class, hooks and the state that holds their
parameters. Such layers cannot be packed, copied or saved one by one. So each rank keeps the
trainer's own, unsharded model, and a new copy is sharded for each training.

Not everything can be sharded: packed layers are small and hold integers, scalars have no shards,
and a weight of several layers would belong to several sharded units. Such parameters are replicated
on every rank, and their gradients are averaged as in DDP.
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

from ...compat import classes_kept_together, own_buffers, own_parameters, persistent_buffer_names
from ...distributed import (
    average_gradients,
    broadcast_from_rank_0,
    broadcast_object,
    full_tensor,
    sum_over_ranks,
)
from ...dynamic_subclass import DynamicSubclass
from ...modeling import packed_layers
from ...modeling.model_copies import copy_with_own_parameters
from ...noise import find_state

if TYPE_CHECKING:
    from accelerate import Accelerator


def require_fsdp2(trainer: Trainer) -> None:
    """Refuse settings that accelerate would ignore, or that change the noise."""
    if any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters()):
        raise ValueError(
            "the model's parameters are sharded already (distributed_config, tp_plan or "
            "fully_shard); load it without, and set TrainingArguments(fsdp=True, "
            "fsdp_config={'version': 2})"
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "unsupported fsdp_config={'version': 1}: FSDP1 flattens the weights of several layers "
            "into one tensor, but noise needs each of them; set fsdp_config={'version': 2}"
        )
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if (trainer.args.fsdp or by_launcher) and not trainer.is_fsdp_enabled:
        option = f"fsdp={trainer.args.fsdp!r}" if trainer.args.fsdp else "FSDP by accelerate launch"
        raise ValueError(
            f"unsupported {option} on {trainer.args.device}: accelerate shards on accelerators "
            "only, and would silently run DDP; remove fsdp"
        )
    if not trainer.is_fsdp_enabled:
        return
    if trainer.model_init is not None:
        raise ValueError(
            "unsupported model_init with fsdp: the model that train() makes would not be sharded; "
            "pass model=model_init() instead"
        )
    if trainer.accelerator.state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "unsupported fsdp_config={'activation_checkpointing': True}: accelerate recomputes "
            "with other random numbers than in the forward, so with other noise and dropout; set "
            "gradient_checkpointing=True instead"
        )
    plugin = trainer.accelerator.state.dynamo_plugin  # compiles for accelerate launch
    if trainer.args.torch_compile or plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "unsupported torch_compile=True (or accelerate's dynamo_backend) with fsdp; remove one "
            "of them, or use DDP"
        )


def share_what_rank_0_read(trainer: Trainer, *models: nn.Module) -> None:
    """Broadcast models that only rank 0 has read from disk. Call on all ranks.

    With ``cpu_ram_efficient_loading``, which ``accelerate config`` turns on, ``from_pretrained``
    leaves them on the meta device on other ranks. It is turned off here for all later loading,
    since each rank needs the complete model.
    """
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
    """Broadcast parameters and persistent buffers of rank 0, and keep ties.

    Those of other ranks may be on the meta device.
    """
    taken: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        local = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
        values = broadcast_from_rank_0(local.detach())
        if not tensor.is_meta:
            tensor.copy_(values)
            continue
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(tensor, nn.Parameter):
            values = nn.Parameter(values, tensor.requires_grad)
            module.register_parameter(attribute, taken.setdefault(id(tensor), values))
        else:
            own_buffers(module)[attribute] = taken.setdefault(id(tensor), values)


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not sharded.

    These are parameters of packed layers, scalars, integers, and parameters of several modules,
    except a head tied to its table, which accelerate supports.
    """
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in own_parameters(module).values():
            holders.setdefault(id(parameter), []).append(module)
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    pair = {id(module) for module in ends}
    packed = {id(p) for _, layer in packed_layers(model) for p in layer.parameters()}

    def is_replicated(parameter: nn.Parameter) -> bool:
        if id(parameter) in packed or parameter.dim() == 0 or not parameter.is_floating_point():
            return True
        modules = holders[id(parameter)]
        return len(modules) > 1 and not {id(module) for module in modules} <= pair

    return [parameter for parameter in model.parameters() if is_replicated(parameter)]


def units_to_shard(model: nn.Module, names: list[str] | None) -> list[str]:
    """Return the names of the classes whose modules are sharded as units.

    Layers that LayerDrop may skip have a dynamic subclass (``dynamic_subclass.py``). Without names,
    accelerate (1.15) uses all of ``_no_split_modules``, and fails if one of them (BERT's
    embeddings) contains the table that it shards separately.
    """
    by_default = names is None
    names = classes_kept_together(model) if by_default else names
    table = getattr(model, "get_input_embeddings", lambda: None)()
    found = {}
    for module in model.modules():
        original = module.original_class if isinstance(module, DynamicSubclass) else type(module)
        holds_table = by_default and any(each is table for each in module.modules())
        if original.__name__ in names and not holds_table:
            found[type(module).__name__] = original.__name__
    missing = set() if by_default else set(names) - set(found.values())
    return [*found, *sorted(missing)]  # accelerate raises for missing classes


class ShardedCopy:
    """A copy ``model`` of a trainer's model, the ``original``, that is sharded and trained.

    The weights of the original stay as they are until :meth:`put_back`.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.original = model
        self.model = copy_with_own_parameters(model)
        self._replicated = replicated_parameters(self.model)
        for tensor in self._replicated:
            tensor.data = tensor.data.to(device)

    @contextmanager
    def rules(self, accelerator: Accelerator) -> Iterator[None]:
        """Return a context in which accelerate shards the copy as described above.

        The plugin is restored afterwards, since all trainers share it. Half precision is done by
        autocast, as under DDP: that of FSDP2 would show rounded weights to the noise and keep
        replicated parameters in float32.
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
        """Move replicated parameters to separate optimizer groups, as fused updates require."""
        replicated = {id(parameter) for parameter in self._replicated}
        for group in list(groups):
            moved = [p for p in group["params"] if id(p) in replicated]
            if moved and len(moved) < len(group["params"]):
                group["params"] = [p for p in group["params"] if id(p) not in replicated]
                groups.append({**group, "params": moved})

    def average_gradients(self) -> None:
        """Average the gradients of replicated parameters over the ranks, before a step."""
        average_gradients(self._replicated)

    def spread_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Broadcast the optimizer state of replicated parameters after loading; on all ranks.

        torch (2.13) restores it on rank 0 only.
        """
        for parameter in self._replicated:
            state = optimizer.state.get(parameter, {})
            from_rank_0 = broadcast_object({key: _on_cpu(value) for key, value in state.items()})
            for key in from_rank_0.keys() - state.keys():
                value = from_rank_0[key]
                # A scalar, such as the number of steps, stays on the CPU.
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value

    @torch.no_grad()
    def put_back(self) -> None:
        """Copy the weights back to the original, with the buffers of rank 0. Call on all ranks."""
        trained = dict(self.model.named_parameters())
        for name, parameter in self.original.named_parameters():
            parameter.copy_(full_tensor(trained[name]))
        buffers = dict(_persistent_buffers(self.model))
        for name, buffer in _persistent_buffers(self.original):
            buffer.copy_(broadcast_from_rank_0(buffers[name]))
        trained_noise, noise = find_state(self.model), find_state(self.original)
        if noise is not None:
            noise.load_state_dict(trained_noise.state_dict())
            noise.p = trained_noise.p


def _autocast(accelerator: Accelerator, forward: Callable) -> Callable:
    @wraps(forward)
    def in_half_precision(*args, **kwargs):
        with accelerator.autocast():
            return forward(*args, **kwargs)

    return convert_outputs_to_fp32(in_half_precision)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name in sorted(persistent_buffer_names(module)):  # in one order on all ranks
            if (buffer := own_buffers(module)[name]) is not None:
                yield f"{prefix}.{name}" if prefix else name, buffer
