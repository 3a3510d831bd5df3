"""Packing a model in memory, stage after stage, so that it can be saved after any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..configuration import QuantizedModelConfig
from ..modeling import pack_layer, packed_layers, packed_names
from ..modeling.activations import require_batches
from ..modeling.importance import measure_importance
from ..modeling.plan import PlannedWeight, make_plan
from ..modeling.restructure import declare_shared, plan_restructuring
from .quantizer import attach
from .ties import TieRewriter


@dataclass(frozen=True)
class StageResult:
    """What packing one stage did.

    Attributes:
        stage: the structure group or regex; None for a pass without stages.
        layers: names of the layers packed.
        relative_error: sum of ||W - W_q||^2 over the stage, over its sum of ||W||^2.
    """

    stage: str | None
    layers: tuple[str, ...]
    relative_error: float


class ModelPacker:
    """Plans how a model is stored, then packs it in place, stage by stage.

    Args:
        model: a dense model; its layers are converted in place.
        config: how to store it; copied, and the copy's ``plan`` grows with the stages.

    Raises:
        TypeError: if the model is no ``PreTrainedModel``.
        ValueError: if it is quantized already, or the config cannot be carried out.
    """

    def __init__(self, model: PreTrainedModel, config: QuantizedModelConfig) -> None:
        check_can_be_packed(model)
        self.model = model
        self.config = deepcopy(config)
        self.config.plan = {}
        self.restructuring = plan_restructuring(model, self.config)
        self.stages, self.config.left_dense = make_plan(model, self.config)

    def restructure(self) -> None:
        """Takes layers out and lets layers share weights, as the config says (7.9); the stages are
        those of what is left. Before the first of them; there may be nothing to do."""
        if self.restructuring.changes:
            self.restructuring.carry_out(self.model, self.config)
            self.stages, self.config.left_dense = make_plan(self.model, self.config)

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
        rewriter = TieRewriter(self.model)
        names: list[str] = []
        error = energy = 0.0
        bar = tqdm(self.stages[stage], desc=f"quantize {stage or 'all layers'}", unit="layer",
                   disable=not progress, leave=False)  # fmt: skip
        for number, planned in enumerate(bar):
            norm = self._norm(planned)
            error += norm * self._pack(planned, number, importance[number])
            energy += norm
            names += [layer.name for layer in planned.layers]
        modules = dict(self.model.named_modules())
        rewriter.rewrite({name: packed_names(modules[name]) for name in names})
        declare_shared(self.model, self.config.shared_layers)
        attach(self.model, self.config)
        return StageResult(stage, tuple(names), error / energy if energy else 0.0)

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

    def _norm(self, planned: PlannedWeight) -> float:
        return float(planned.layers[0].module.weight.detach().float().square().sum())

    def _pack(self, planned: PlannedWeight, number: int, importance: Tensor | None) -> float:
        modules: list[nn.Module] = [layer.module for layer in planned.layers]
        error = pack_layer(
            modules,
            planned.quantizer,
            seed=self.config.seed + number,
            activation_bits=planned.activation_bits,
            importance=importance,
        )
        self.config.plan.update(planned.entries())
        return error


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
