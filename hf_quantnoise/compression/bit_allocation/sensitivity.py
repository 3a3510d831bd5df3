"""What it costs to store one weight in one way: how far the model's output moves from its own.

With calibration batches the divergence (``distillation.py``) of the model with one quantized weight
from the model without is measured at two candidates of each weight, and carried over to the others
through their quantization error: for small errors divergence grows with ||W - W_q||^2, the gradient
being zero where the output is its own target. Without batches the error alone has to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...blocks import weight_matrix
from ...distributed import raise_on_all_ranks, sum_over_ranks
from ...structure import LayerInfo
from ..distillation.logits import logits_divergence
from .candidates import Trial, WeightChoices

# A few batches do not reach every word and path: no weight counts for less than this share of the
# median sensitivity.
LEAST_SHARE = 0.01


def outputs_of(outputs: Any) -> dict[str, Tensor]:
    """The tensors of a forward by which predictions are compared: all logits; of a model without a
    head, its first floating-point output.

    Raises:
        ValueError: if there is neither.
    """
    named = dict(outputs) if isinstance(outputs, Mapping) else dict(enumerate(outputs))
    tensors = {
        str(name): value
        for name, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    }
    logits = {name: value for name, value in tensors.items() if name.endswith("logits")}
    first = dict(list(tensors.items())[:1])
    if not (logits or first):
        raise ValueError(
            f"the model's output has no logits and no hidden states to compare ({list(named)}); "
            "leave the calibration batches out, and the target is met by quantization errors alone"
        )
    return logits or first


def divergence(
    model: nn.Module,
    outputs: dict[str, Tensor],
    reference: dict[str, Tensor],
    batch: Mapping[str, Any],
) -> float:
    """How far outputs lie from those of the unquantized model: of logits the teacher's divergence
    (``heads.py``), of anything else the squared error relative to the reference."""
    if all(name.endswith("logits") for name in outputs):
        return float(logits_divergence(model, outputs, reference, batch))
    total = 0.0
    for name, own in outputs.items():
        other = reference[name].float()
        error = (own.float() - other).square().mean()
        total += float(error / other.square().mean().clamp(min=1e-30))
    return total


class OutputDivergence:
    """Measures how far the output moves when one weight is quantized. In a distributed run all
    ranks do it together, each with batches of its own.

    Args:
        model: in eval mode; its parameters are exchanged for the time of a forward, never written.
        batches: keyword arguments of its forward, a dict each; a rank may have none.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.batches = model, batches
        with raise_on_all_ranks():
            self.reference = [outputs_of(model(**batch)) for batch in batches]

    def of(self, members: Sequence[LayerInfo], matrix: Tensor) -> float:
        """The mean divergence over the batches of all ranks, with a weight replaced in all layers
        that hold it.

        Args:
            members: those layers.
            matrix: (rows, columns).
        """
        weight = members[0].module._parameters["weight"]
        values = members[0].layer_type.from_matrix(matrix, weight.shape).to(weight.dtype)
        trial = nn.Parameter(values, requires_grad=False)
        try:
            for layer in members:
                layer.module._parameters["weight"] = trial
            found = [
                divergence(self.model, outputs_of(self.model(**batch)), reference, batch)
                for batch, reference in zip(self.batches, self.reference, strict=True)
            ]
        finally:
            for layer in members:
                layer.module._parameters["weight"] = weight
        total = torch.tensor([sum(found), len(found)], dtype=torch.float64)
        divergence_sum, count = sum_over_ranks(total).tolist()
        return divergence_sum / count


def _trials_for(choices: WeightChoices, bits: float) -> list[Trial]:
    """The two trials nearest to some bits per weight and to half of them."""
    picked: dict[int, Trial] = {}
    for wanted in (bits, bits / 2):
        if choices.trials:
            nearest = min(
                choices.trials,
                key=lambda trial: abs(
                    math.log(8 * trial.candidate.bytes / choices.numel) - math.log(wanted)
                ),
            )
            picked[id(nearest)] = nearest
    return list(picked.values())


def _interpolated(points: list[tuple[float, float]], error: float) -> float:
    """Divergence at a quantization error: a straight line in logarithms between two measured
    points, in proportion to the error outside of them."""
    points = sorted(points)
    (low, first), (high, last) = points[0], points[-1]
    last = max(first, last)
    if error <= low or high <= low:
        return first * error / low
    if error >= high:
        return last * error / high
    if not first:
        return last * error / high
    # In logarithms throughout: the quotient of two measured divergences may overflow.
    along = math.log(error / low) / math.log(high / low)
    return math.exp((1 - along) * math.log(first) + along * math.log(last))


Costs = list[list[float]]


def costs_by_error(weights: Sequence[WeightChoices]) -> Costs:
    """Without data: ||W - W_q||^2 / ||W||^2 times the number of weights, of every candidate."""
    return [[own.error * choices.numel for own in choices.candidates] for choices in weights]


@torch.no_grad()
def costs_by_output(
    weights: Sequence[WeightChoices],
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    bits: float,
    progress: bool = False,
) -> Costs:
    """Divergence of the output, of every candidate of every weight. On all ranks.

    Args:
        weights: their candidates; layers are modules of ``model``.
        model: the unquantized model, in eval mode.
        batches: keyword arguments of its forward.
        bits: about how many bits a weight will have, near which is measured.
        progress: show a bar.

    Raises:
        ValueError: if the model has no output to compare, none of the weights has any influence, or
            a trial's output is not finite.
    """
    measure = OutputDivergence(model, batches)
    curves: list[Callable[[float], float]] = []
    per_number = []
    for choices in tqdm(weights, desc="sensitivity", unit="weight", disable=not progress):
        points = _measured(choices, measure, bits)
        curves.append(lambda error, points=points: _interpolated(points, error) if points else 0.0)
        if points:
            per_number.append(curves[-1](points[0][0]) / (points[0][0] * choices.numel))
    typical = median(per_number) if per_number else 0.0
    if not typical > 0:
        typical = max(per_number, default=0.0)
    if not typical > 0:
        raise ValueError(
            "quantizing any one weight left the output of all calibration batches as it is: they "
            "do not reach the model's layers; give other batches, or none"
        )
    return [
        [
            max(curve(own.error), LEAST_SHARE * typical * own.error * choices.numel)
            for own in choices.candidates
        ]
        for choices, curve in zip(weights, curves, strict=True)
    ]


def _measured(
    choices: WeightChoices, measure: OutputDivergence, bits: float
) -> list[tuple[float, float]]:
    """(error, divergence) of the trials of one weight; the error is the trial's own."""
    matrix = weight_matrix(choices.members[0].module)
    energy = float(matrix.float().square().sum())
    points = []
    for trial in _trials_for(choices, bits):
        quantized = trial.quantized(matrix)
        error = float((matrix.float() - quantized.float()).square().sum()) / energy if energy else 0
        if error > 0:
            moved = measure.of(choices.members, quantized)
            if not math.isfinite(moved):  # max(0, NaN) is 0: it would count as harmless
                raise ValueError(
                    f"{choices.name}: with {trial.candidate.short_name} in place of its weight the "
                    f"output moves by {moved}, which is no number to compare; try the model in "
                    "float32, see that its own output is finite, or leave the layer out "
                    "(exclude_modules)"
                )
            points.append((error, max(0.0, moved)))
    return points
