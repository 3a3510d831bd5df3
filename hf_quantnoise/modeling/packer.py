"""Packs a complete model in memory, stage by stage; it can be saved after any stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from ..argument_checks import run_batch
from ..blocks import weight_matrix
from ..configuration import IPQConfig, QuantizedModelConfig
from ..distributed import (
    broadcast_from,
    is_distributed,
    is_own_task,
    raise_on_all_ranks,
    rank_of_task,
    sum_over_ranks,
)
from ..lookups import Lookups
from ..quantizers.base import sum_of_squares
from .activations import calibrate, require_batches, require_runs, rounds_inputs
from .convert import pack_layer, pack_skeleton, packed_names
from .fitted_weights import FittedWeight, FittedWeights
from .float16 import excluded_layers, round_to_float16
from .importance import measure_importance, require_measurable
from .packable import check_can_be_packed
from .plan import PlannedWeight, checked_weights, make_plan
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
        fitted: layer -> what its noise was fitted to, from which its quantization starts.
        lookups: :func:`count_lookups`, if ``config.counts_lookups``.
        on_all_ranks: whether all ranks of a distributed run pack the same model. Each rank then
            clusters a part of the weights and sends the result to the others.

    Attributes:
        stages: stage -> the weights it packs.
        leftovers: the weights that :meth:`pack_leftovers` packs.
        planned: the model of the layers in ``stages``: a copy until pruning and sharing are done.
        excluded: names of the layers that keep all their tensors as they are.

    Raises:
        ValueError: if the model is quantized, or the config does not fit it; it stays unchanged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: QuantizedModelConfig,
        on_all_ranks: bool = False,
        fitted: Mapping[nn.Module, FittedWeight] | None = None,
        lookups: Lookups | None = None,
    ) -> None:
        self.on_all_ranks = on_all_ranks
        self.fitted = FittedWeights({} if fitted is None else fitted)
        self.lookups = lookups or {}
        check_can_be_packed(model)
        self.model = model
        self.config = deepcopy(config)
        self.config.clear_records()  # it may be of another compressed model
        self.structural_changes = plan_structural_changes(model, self.config)
        self.planned = model
        if self.structural_changes:
            self.planned = changed_copy(model, self.config)
        plan = make_plan(self.planned, self.config)
        self.stages, self.leftovers, self.config.left_dense = plan
        self.excluded = excluded_layers(self.planned, self.config)
        if isinstance(self.config, IPQConfig) and self.config.has_default_stages:
            self.config.stages = [stage for stage in self.stages if stage is not None]

    def check_weights(self, *stages: str | None) -> None:
        """Raise ValueError, naming the layer, if a weight (by default of all stages) is invalid."""
        with self._raising_together():
            for stage in stages or self.stages:
                self.stages[stage] = checked_weights(self.stages[stage])
            for planned in () if stages else self.leftovers:
                planned.check_values()

    def require_runs(
        self, batches: Sequence, forward: Callable[[object], object] | None = None
    ) -> None:
        """Raise ValueError, before packing starts, if inputs to be measured do not exist.

        ``forward`` runs a batch through :attr:`planned`; None is ``planned(**batch)``.
        """
        if not self.config.reads_inputs:
            return
        require_batches(batches, self.config.reads_inputs)
        weights = list(chain.from_iterable(self.stages.values()))
        forward = forward or (lambda batch: run_batch(self.planned, batch))
        rounded = [
            layer
            for planned in weights
            for layer in planned.modules
            if rounds_inputs(layer, planned.activation_bits)
        ]
        require_runs(self.planned, rounded, batches, forward)
        if self.config.weighs_errors:
            layers = [planned.modules for planned in weights]
            require_measurable(self.planned, layers, batches, forward)

    def change_structure(self) -> None:
        """Prune and share layers by the config (section 7.9). Call before the first stage."""
        if not self.structural_changes:
            return
        self.structural_changes.apply(self.model, self.config)
        self.planned = self.model
        for stage, weights in self.stages.items():
            self.stages[stage] = [planned.of(self.model) for planned in weights]
        self.leftovers = [planned.of(self.model) for planned in self.leftovers]

    def pack_stage(
        self,
        stage: str | None,
        progress: bool = True,
        batches: Sequence = (),
        forward: Callable[[object], object] | None = None,
    ) -> StageResult:
        """Pack the layers of one stage, bottom-up. Call :meth:`check_weights` before it.

        With ``importance`` in the config, ``batches`` and ``forward`` are the calibration data of
        :func:`measure_importance`; the earlier stages are packed when it is measured.
        """
        weights = self.stages[stage]
        self.fitted.report(weights)
        importance = self._importance(weights, batches, forward)
        bar = tqdm(weights, desc=f"quantize {stage or 'all layers'}", unit="layer",
                   disable=not progress, leave=False)  # fmt: skip
        norms = [sum_of_squares(weight_matrix(planned.modules[0])) for planned in weights]
        errors = self._pack_weights(bar, weights, importance)
        error = sum(norm * relative for norm, relative in zip(norms, errors.values(), strict=True))
        names = tuple(self.layers_of(stage))
        return StageResult(stage, names, error / (sum(norms) or 1.0), errors)

    def pack_leftovers(self) -> None:
        """Store what no stage has packed in ``leftover_bits``. Call after the last stage."""
        self._pack_weights(self.leftovers, self.leftovers, [None] * len(self.leftovers))
        self.round_leftovers()

    def round_leftovers(self) -> None:
        """Round what is not packed to float16, and list what float16 cannot hold.

        Call it again if statistics were measured for the weights of :meth:`pack_leftovers`.
        """
        if self.config.leftover_bits == 32:
            return
        excluded = (self.model.get_submodule(name) for name in self.excluded)
        kept = {id(tensor) for layer in excluded for tensor in layer.parameters(recurse=False)}
        for name in round_to_float16(self.model, kept):
            self.config.left_dense[name] = "its values exceed the range of float16"

    def pack_all(self, progress: bool = False, batches: Sequence = ()) -> list[StageResult]:
        """Prune and share layers, then pack every stage without training in between."""
        self.check_weights()
        self.change_structure()
        results = []
        for stage in self.stages:
            results.append(self.pack_stage(stage, progress, batches))
            if self.config.weighs_errors:  # the next stage is measured on this one's outputs
                layers = [self.model.get_submodule(name) for name in results[-1].layers]
                calibrate(self.model, layers, batches)
        self.pack_leftovers()
        return results

    def pack_skeletons(self) -> None:
        """Pack all layers with empty tensors, to count their bytes, also on the meta device."""
        self.change_structure()
        self.restore_stages(self.stages)
        self.round_leftovers()

    def restore_stages(
        self, stages: Iterable[str | None], plan: Mapping[str, Any] | None = None
    ) -> None:
        """Give the layers of stages their packed form with empty tensors, to be loaded later.

        With the last stage, this includes the layers that :meth:`pack_leftovers` packs. ``plan`` is
        that of the run that packed them.
        """
        for stage in stages:
            weights = list(self.stages.get(stage, ()))
            weights += self.leftovers if stage == self.last_stage else []
            with self._transformers_updated(weights):
                for planned in weights:
                    self._pack_empty(planned.for_values().recorded_in(plan or {}))

    @property
    def last_stage(self) -> str | None:
        """The last stage that packs something."""
        return list(self.stages)[-1]

    def _raising_together(self) -> AbstractContextManager:
        return raise_on_all_ranks() if self.on_all_ranks else nullcontext()

    def layers_of(self, stage: str | None) -> list[str]:
        """Return the names of a stage's layers; empty if the plan has no such stage."""
        return _layer_names(self.stages.get(stage, ()))

    @contextmanager
    def _transformers_updated(self, weights: Sequence[PlannedWeight]) -> Iterator[None]:
        """Update ties and the quantizer that transformers keeps, after weights were packed."""
        with renamed_ties(self.model, _layer_names(weights)):
            yield
        declare_shared(self.model, self.config.shared_layers)
        # The class that hub/ registers with transformers under the config's quant_method.
        AutoHfQuantizer.from_config(self.config, pre_quantized=True).attach(self.model)

    def _importance(self, weights, batches, forward) -> Sequence[Tensor | None]:
        if not self.config.weighs_errors:
            return [None] * len(weights)
        layers = [planned.modules for planned in weights]
        return measure_importance(self.model, layers, batches, forward)

    def _pack_weights(
        self,
        bar: Iterable[PlannedWeight],
        weights: Sequence[PlannedWeight],
        importance: Sequence[Tensor | None],
    ) -> dict[str, float]:
        """Pack weights, over which ``bar`` iterates; return the relative error of each."""
        errors: dict[str, float] = {}
        with self._transformers_updated(weights):
            with self._raising_together():
                for number, planned in enumerate(bar):
                    errors[planned.layers[0].name] = self._pack(planned, number, importance[number])
            self._exchange(weights, errors)
        return errors

    def _pack(self, planned: PlannedWeight, number: int, importance: Tensor | None) -> float:
        """Pack one weight (empty if another rank clusters it) and return its relative error."""
        if self.on_all_ranks and not is_own_task(number):
            self._pack_empty(planned)
            return 0.0
        try:
            error = pack_layer(
                planned.modules,
                planned.quantizer,
                seed=self.config.seed + number,
                activation_bits=planned.activation_bits,
                importance=importance,
                fitted=self.fitted.start_of(planned),
                lookups=self.lookups.get(planned.layers[0].name),
            )
        except ValueError as reason:
            raise ValueError(f"cannot quantize {planned.layers[0].name}: {reason}") from reason
        self.config.plan.update(planned.entries())
        return error

    def _pack_empty(self, planned: PlannedWeight) -> None:
        pack_skeleton(planned.modules, planned.quantizer, planned.activation_bits)
        self.config.plan.update(planned.entries())

    @torch.no_grad()
    def _exchange(self, weights: Sequence[PlannedWeight], errors: dict[str, float]) -> None:
        """Send what each rank has clustered, codes and state, to all ranks."""
        if not self.on_all_ranks or not is_distributed() or not weights:
            return
        for number, planned in enumerate(weights):
            layer = planned.modules[0]
            tensors = layer.tensors()
            for name in packed_names(layer):
                tensor = tensors[name]
                tensor.copy_(broadcast_from(tensor.detach(), rank_of_task(number)))
        device = layer.weight_indices.device
        found = torch.tensor(list(errors.values()), device=device, dtype=torch.float32)
        errors.update(zip(errors, sum_over_ranks(found).tolist(), strict=True))


def _layer_names(weights: Iterable[PlannedWeight]) -> list[str]:
    return [layer.name for planned in weights for layer in planned.layers]
