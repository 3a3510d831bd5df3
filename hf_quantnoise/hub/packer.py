"""Packing a model in memory, stage after stage, so that it can be saved after any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..configuration import QuantizedModelConfig
from ..distributed import broadcast_from, is_distributed, is_mine, owner_of, sum_over_ranks
from ..modeling import pack_layer, pack_skeleton, packed_layers, packed_names
from ..modeling.activations import require_batches, require_runs, rounds_inputs
from ..modeling.importance import measure_importance
from ..modeling.plan import PlannedWeight, make_plan
from ..modeling.restructure import declare_shared, plan_restructuring, restructured_copy
from .quantizer import attach
from .ties import TieRewriter


@dataclass(frozen=True)
class StageResult:
    """What packing one stage did.

    Attributes:
        stage: the structure group or regex; None for a pass without stages.
        layers: names of the layers packed.
        relative_error: sum of ||W - W_q||^2 over the stage, over its sum of ||W||^2.
        errors: ||W - W_q||^2 / ||W||^2 of each weight, by the first layer that holds it.
    """

    stage: str | None
    layers: tuple[str, ...]
    relative_error: float
    errors: dict[str, float]


class ModelPacker:
    """Plans how a model is stored, then packs it in place, stage by stage.

    Args:
        model: a dense model; its layers are converted in place.
        config: how to store it; copied, and the copy's ``plan`` grows with the stages.
        on_all_ranks: whether all ranks of a distributed run pack the same model: weights go round
            among them, and each gets what the others clustered.

    Attributes:
        stages: stage -> the weights it packs.
        planned: the model that holds their layers: a copy as long as layers are yet to be taken out
            or shared, the model itself otherwise.

    Raises:
        TypeError: if the model is no ``PreTrainedModel``.
        ValueError: if it is quantized already, or the config cannot be carried out.
    """

    def __init__(
        self, model: PreTrainedModel, config: QuantizedModelConfig, on_all_ranks: bool = False
    ) -> None:
        self.on_all_ranks = on_all_ranks
        check_can_be_packed(model)
        self.model = model
        self.config = deepcopy(config)
        self.config.plan = {}
        self.restructuring = plan_restructuring(model, self.config)
        # The plan is that of what will be left; if it cannot be carried out, nothing was touched.
        self.planned = model
        if self.restructuring.changes:
            self.planned = restructured_copy(model, self.config, self.restructuring)
        self.stages, self.config.left_dense = make_plan(self.planned, self.config)

    def require_runs(self, batches: Sequence) -> None:
        """Whether calibration data reaches what is to be measured on it; before anything is packed.

        Raises:
            ValueError: naming a layer that never runs on it; nothing is changed then.
        """
        groups: list[list[nn.Module]] = []
        for planned in (planned for stage in self.stages.values() for planned in stage):
            modules = [layer.module for layer in planned.layers]
            groups += [[own] for own in modules if rounds_inputs(own, planned.activation_bits)]
            # Tables are watched where rows are looked up, which need not be a call (importance.py).
            if self.config.weighs_errors and not any(isinstance(m, nn.Embedding) for m in modules):
                groups.append(modules)
        require_runs(self.planned, groups, batches, self.config.reads_data)

    def restructure(self) -> None:
        """Takes layers out and lets layers share weights, as the config says (7.9); the stages are
        those of what is left. Before the first of them; there may be nothing to do."""
        if self.restructuring.changes:
            self.restructuring.carry_out(self.model, self.config)
            self.planned = self.model
            self.stages = {
                stage: [planned.of(self.model) for planned in weights]
                for stage, weights in self.stages.items()
            }

    def pack_stage(
        self,
        stage: str | None,
        progress: bool = True,
        batches: Sequence = (),
        forward: Callable[[object], object] | None = None,
    ) -> StageResult:
        """Packs the layers of one stage, bottom-up.

        Args:
            stage: a key of :attr:`stages`.
            progress: show a bar that counts weights.
            batches, forward: calibration data, read where the config has ``importance``
                (``modeling/importance.py``): the inputs are those of the model as it stands, with
                the stages before this one packed.

        Raises:
            ValueError: if the config needs calibration data and there is none.
        """
        importance = self._importance(stage, batches, forward)
        errors: dict[str, float] = {}
        norms: list[float] = []
        bar = tqdm(self.stages[stage], desc=f"quantize {stage or 'all layers'}", unit="layer",
                   disable=not progress, leave=False)  # fmt: skip
        with self._names_follow(stage):
            for number, planned in enumerate(bar):
                norms.append(self._norm(planned))
                errors[planned.layers[0].name] = self._pack(planned, number, importance[number])
            self._exchange(stage, errors)
        energy = sum(norms)
        error = sum(norm * own for norm, own in zip(norms, errors.values(), strict=True))
        names = tuple(self.layers_of(stage))
        return StageResult(stage, names, error / energy if energy else 0.0, errors)

    def layers_of(self, stage: str | None) -> list[str]:
        """The names of the layers of a stage; none where the plan has no such stage."""
        return [layer.name for planned in self.stages.get(stage, ()) for layer in planned.layers]

    def restore_stage(self, stage: str | None) -> None:
        """Gives the layers of a stage their packed form without quantizing them: what they hold is
        to be read from somewhere."""
        with self._names_follow(stage):
            for planned in self.stages[stage]:
                self._pack_empty(planned)

    def _pack_empty(self, planned: PlannedWeight) -> None:
        modules = [layer.module for layer in planned.layers]
        pack_skeleton(modules, planned.quantizer, planned.activation_bits)
        self.config.plan.update(planned.entries())

    @contextmanager
    def _names_follow(self, stage: str | None) -> Iterator[None]:
        """Around the packing of a stage: keeps what transformers knows of the model in step."""
        rewriter = TieRewriter(self.model)
        yield
        modules = dict(self.model.named_modules())
        rewriter.rewrite({name: packed_names(modules[name]) for name in self.layers_of(stage)})
        declare_shared(self.model, self.config.shared_layers)
        attach(self.model, self.config)

    def pack_all(self, progress: bool = False, batches: Sequence = ()) -> list[StageResult]:
        """Restructures, then packs every stage, without training in between."""
        self.restructure()
        return [self.pack_stage(stage, progress, batches) for stage in self.stages]

    def _importance(self, stage, batches, forward) -> list[Tensor | None]:
        weights = [[layer.module for layer in planned.layers] for planned in self.stages[stage]]
        if not self.config.weighs_errors:
            return [None] * len(weights)
        require_batches(batches, "importance")
        return measure_importance(self.model, weights, batches, forward)

    def pack_skeletons(self) -> None:
        """As :meth:`pack_all`, with empty tensors: nothing is quantized. For models on the meta
        device, whose bytes are to be counted."""
        self.restructure()
        for stage in self.stages:
            self.restore_stage(stage)

    def _norm(self, planned: PlannedWeight) -> float:
        return float(planned.layers[0].module.weight.detach().float().square().sum())

    def _pack(self, planned: PlannedWeight, number: int, importance: Tensor | None) -> float:
        """Packs one weight; returns its relative error. What another rank clusters is left empty,
        with an error of 0, until :meth:`_exchange`."""
        if self.on_all_ranks and not is_mine(number):
            self._pack_empty(planned)
            return 0.0
        self.config.plan.update(planned.entries())
        return pack_layer(
            [layer.module for layer in planned.layers],
            planned.quantizer,
            seed=self.config.seed + number,
            activation_bits=planned.activation_bits,
            importance=importance,
        )

    @torch.no_grad()
    def _exchange(self, stage: str | None, errors: dict[str, float]) -> None:
        """Gives every rank what each has clustered, codes and state alike."""
        if not self.on_all_ranks or not is_distributed():
            return
        for number, planned in enumerate(self.stages[stage]):
            layer = planned.layers[0].module
            for name in packed_names(layer):
                tensor = layer._parameters[name]
                tensor.copy_(broadcast_from(tensor.detach(), owner_of(number)))
        device = layer.weight_indices.device
        found = torch.tensor(list(errors.values()), device=device, dtype=torch.float32)
        errors.update(zip(errors, sum_over_ranks(found).tolist(), strict=True))


def check_can_be_packed(model: nn.Module) -> None:
    """Refuses what cannot be packed, with the way out.

    Raises:
        TypeError: if the model is no ``PreTrainedModel``.
        ValueError: if it is quantized already, or noisy.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; compression needs a transformers PreTrainedModel "
            "(unwrap it first, e.g. accelerator.unwrap_model(model))"
        )
    if any(packed_layers(model)):
        raise ValueError(
            "the model is quantized already; call model.dequantize() first, or load the dense one"
        )
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "another method")
        raise ValueError(f"the model is quantized by {method}; load the dense checkpoint instead")
