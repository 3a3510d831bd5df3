"""Packs a complete model in memory, stage by stage; it can be saved after any stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from ..argument_checks import require_model
from ..compat import stop_rescaling
from ..configuration import QuantizedModelConfig
from ..distributed import broadcast_from, is_distributed, is_own_task, rank_of_task, sum_over_ranks
from ..quantizers.base import require_finite
from .activations import require_batches, require_runs, rounds_inputs
from .convert import pack_layer, pack_skeleton, packed_layers, packed_names
from .importance import measure_importance
from .plan import PlannedWeight, make_plan
from .structural_changes import changed_copy, declare_shared, plan_structural_changes
from .ties import renamed_ties


@dataclass(frozen=True)
class StageResult:
    """The result of packing one stage, which is None in a run without stages.

    ``relative_error`` is the sum of ||W - W_q||^2 over the stage divided by that of ||W||^2, and
    ``errors`` the same of each weight, by the first layer that holds it.
    """

    stage: str | None
    layers: tuple[str, ...]
    relative_error: float
    errors: dict[str, float]


class ModelPacker:
    """Plans how a model is stored, then packs it in place, stage by stage.

    Args:
        model: a dense model; its layers are converted in place.
        config: how to store it. It is copied; the copy's ``plan`` grows with each stage.
        on_all_ranks: whether all ranks of a distributed run pack the same model. Each rank then
            clusters a part of the weights and sends the result to the others.

    Attributes:
        stages: stage -> the weights it packs.
        planned: the model whose layers ``stages`` refers to: a copy until pruning and sharing have
            been applied, then the model itself.

    Raises:
        ValueError: if the model is quantized, or the config does not fit it; it stays unchanged.
    """

    def __init__(
        self, model: PreTrainedModel, config: QuantizedModelConfig, on_all_ranks: bool = False
    ) -> None:
        self.on_all_ranks = on_all_ranks
        check_can_be_packed(model)
        self.model = model
        stop_rescaling(model)
        self.config = deepcopy(config)
        self.config.plan = {}
        self.structural_changes = plan_structural_changes(model, self.config)
        self.planned = model
        if self.structural_changes:
            self.planned = changed_copy(model, self.config)
        self.stages, self.config.left_dense = make_plan(self.planned, self.config)

    def require_runs(self, batches: Sequence) -> None:
        """Raise ValueError, before packing starts, if a layer to be measured never runs."""
        groups: list[list[nn.Module]] = []
        for planned in chain.from_iterable(self.stages.values()):
            modules = planned.modules
            groups += [[m] for m in modules if rounds_inputs(m, planned.activation_bits)]
            # Lookups are counted in F.embedding, which may run without a call of the layer.
            if self.config.weighs_errors and not any(isinstance(m, nn.Embedding) for m in modules):
                groups.append(modules)
        require_runs(self.planned, groups, batches, self.config.reads_data)

    def change_structure(self) -> None:
        """Prune and share layers by the config (section 7.9). Call before the first stage."""
        if not self.structural_changes:
            return
        self.structural_changes.apply(self.model, self.config)
        self.planned = self.model
        for stage, weights in self.stages.items():
            self.stages[stage] = [planned.of(self.model) for planned in weights]

    def pack_stage(
        self,
        stage: str | None,
        progress: bool = True,
        batches: Sequence = (),
        forward: Callable[[object], object] | None = None,
    ) -> StageResult:
        """Pack the layers of one stage, bottom-up.

        With ``importance`` in the config, ``batches`` and ``forward`` are the calibration data of
        :func:`measure_importance`; the earlier stages are packed when it is measured.
        """
        importance = self._importance(stage, batches, forward)
        errors: dict[str, float] = {}
        norms: list[float] = []
        bar = tqdm(self.stages[stage], desc=f"quantize {stage or 'all layers'}", unit="layer",
                   disable=not progress, leave=False)  # fmt: skip
        with self._transformers_updated(stage):
            for number, planned in enumerate(bar):
                weight = planned.modules[0].weight
                norms.append(float(weight.detach().float().square().sum()))
                errors[planned.layers[0].name] = self._pack(planned, number, importance[number])
            self._exchange(stage, errors)
        energy = sum(norms)
        error = sum(norm * relative for norm, relative in zip(norms, errors.values(), strict=True))
        names = tuple(self.layers_of(stage))
        return StageResult(stage, names, error / energy if energy else 0.0, errors)

    def pack_all(self, progress: bool = False, batches: Sequence = ()) -> list[StageResult]:
        """Prune and share layers, then pack every stage without training in between."""
        self.change_structure()
        return [self.pack_stage(stage, progress, batches) for stage in self.stages]

    def pack_skeletons(self) -> None:
        """Pack all layers with empty tensors, for the size of models on the meta device."""
        self.change_structure()
        for stage in self.stages:
            self.restore_stage(stage)

    def restore_stage(self, stage: str | None) -> None:
        """Give the layers of a stage their packed form with empty tensors, to be loaded later."""
        with self._transformers_updated(stage):
            for planned in self.stages[stage]:
                self._pack_empty(planned)

    def layers_of(self, stage: str | None) -> list[str]:
        """Return the names of a stage's layers; empty if the plan has no such stage."""
        return [layer.name for planned in self.stages.get(stage, ()) for layer in planned.layers]

    @contextmanager
    def _transformers_updated(self, stage: str | None) -> Iterator[None]:
        """Update ties and the quantizer that transformers keeps, after a stage was packed."""
        with renamed_ties(self.model, self.layers_of(stage)):
            yield
        declare_shared(self.model, self.config.shared_layers)
        # The class that hub/ registers with transformers under the config's quant_method.
        AutoHfQuantizer.from_config(self.config, pre_quantized=True).attach(self.model)

    def _importance(self, stage, batches, forward) -> Sequence[Tensor | None]:
        weights = [planned.modules for planned in self.stages[stage]]
        if not self.config.weighs_errors:
            return [None] * len(weights)
        require_batches(batches, "importance")
        return measure_importance(self.model, weights, batches, forward)

    def _pack(self, planned: PlannedWeight, number: int, importance: Tensor | None) -> float:
        """Pack one weight (empty if another rank clusters it) and return its relative error."""
        if self.on_all_ranks and not is_own_task(number):
            self._pack_empty(planned)
            return 0.0
        first = planned.layers[0]
        require_finite(first.module.weight, f"{first.name}.weight")
        self.config.plan.update(planned.entries())
        return pack_layer(
            planned.modules,
            planned.quantizer,
            seed=self.config.seed + number,
            activation_bits=planned.activation_bits,
            importance=importance,
        )

    def _pack_empty(self, planned: PlannedWeight) -> None:
        pack_skeleton(planned.modules, planned.quantizer, planned.activation_bits)
        self.config.plan.update(planned.entries())

    @torch.no_grad()
    def _exchange(self, stage: str | None, errors: dict[str, float]) -> None:
        """Send what each rank has clustered, codes and state, to all ranks."""
        if not self.on_all_ranks or not is_distributed():
            return
        for number, planned in enumerate(self.stages[stage]):
            layer = planned.modules[0]
            tensors = layer.tensors()
            for name in packed_names(layer):
                tensor = tensors[name]
                tensor.copy_(broadcast_from(tensor.detach(), rank_of_task(number)))
        device = layer.weight_indices.device
        found = torch.tensor(list(errors.values()), device=device, dtype=torch.float32)
        errors.update(zip(errors, sum_over_ranks(found).tolist(), strict=True))


def has_adapters(model: nn.Module) -> bool:
    """Return whether PEFT has wrapped a model, or some of its layers."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def check_can_be_packed(model: nn.Module) -> None:
    """Check that a model can be packed.

    Raises:
        TypeError: if it is not a ``PreTrainedModel``.
        ValueError: if it is quantized, or has adapters.
    """
    if isinstance(model, nn.Module) and has_adapters(model):
        raise ValueError(
            f"invalid model: {type(model).__name__} has PEFT adapters, which cannot be packed; "
            "merge them first, and use the result of peft_model.merge_and_unload() (in a trainer: "
            "trainer.model = trainer.model.merge_and_unload())"
        )
    require_model(model)
    if any(packed_layers(model)):
        raise ValueError(
            "the model is already quantized; call model.dequantize() first, or load the dense model"
        )
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None) or "another method"
        raise ValueError(
            f"the model is already quantized with {getattr(method, 'value', method)}; load the "
            "dense checkpoint instead"
        )
