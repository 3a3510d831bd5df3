"""The cost of each candidate: how much the model's output changes if one weight is stored that way.

With calibration batches, the divergence between the output of the model with one quantized weight
and that of the dense model is measured for two candidates of each weight. The other candidates are
interpolated by their quantization error: for small errors the divergence grows with
||W - W_q||^2, because its gradient is zero at the dense model. Without batches, the cost is the
quantization error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...blocks import weight_matrix
from ...compat import own_parameters
from ...distributed import raise_on_all_ranks, sum_over_ranks
from ...structure import LayerInfo
from ..distillation.logits import logits_divergence
from .candidates import Candidate, WeightCandidates

# A few batches do not reach every token and path, so the sensitivity of each weight is at least
# this fraction of the median.
MIN_SENSITIVITY = 0.01

Costs = list[list[float]]


def comparable_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return the outputs of a forward to compare: all logits, or without logits the first float.

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
            f"cannot measure sensitivities: the model's output has neither logits nor hidden "
            f"states (got {list(named)}); pass no calibration batches to use quantization errors"
        )
    return logits or first


def output_divergence(
    model: nn.Module,
    outputs: dict[str, Tensor],
    reference: dict[str, Tensor],
    batch: Mapping[str, Any],
) -> float:
    """Return the divergence between outputs and those of the dense model.

    Logits are compared as in distillation, other outputs by the squared error relative to the
    reference.
    """
    if all(name.endswith("logits") for name in outputs):
        return float(logits_divergence(model, outputs, reference, batch))
    total = 0.0
    for name, output in outputs.items():
        target = reference[name].float()
        error = (output.float() - target).square().mean()
        total += float(error / target.square().mean().clamp(min=1e-30))
    return total


class SensitivityMeter:
    """Measures how much the output changes if one weight is replaced.

    In a distributed run all ranks measure together, each with its own batches.

    Args:
        model: in eval mode. Its weights are swapped for a forward, never written to.
        batches: keyword arguments of its forward; a rank may have none.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.batches = model, batches
        with raise_on_all_ranks():
            self.reference = [comparable_outputs(model(**batch)) for batch in batches]

    def measure(self, layers: Sequence[LayerInfo], matrix: Tensor) -> float:
        """Return the mean divergence over the batches of all ranks with a replaced weight.

        Args:
            layers: the layers that hold the weight.
            matrix: its replacement, of shape (rows, columns).
        """
        weight = own_parameters(layers[0].module)["weight"]
        values = layers[0].layer_type.from_matrix(matrix, weight.shape).to(weight.dtype)
        replacement = nn.Parameter(values, requires_grad=False)
        try:
            for layer in layers:
                own_parameters(layer.module)["weight"] = replacement
            divergences = [
                output_divergence(
                    self.model, comparable_outputs(self.model(**batch)), reference, batch
                )
                for batch, reference in zip(self.batches, self.reference, strict=True)
            ]
        finally:
            for layer in layers:
                own_parameters(layer.module)["weight"] = weight
        sums = torch.tensor([sum(divergences), len(divergences)], dtype=torch.float64)
        total, count = sum_over_ranks(sums).tolist()
        return total / count


def costs_by_error(weights: Sequence[WeightCandidates]) -> Costs:
    """Return ||W - W_q||^2 / ||W||^2 times the number of weights, for every candidate."""
    return [[each.error * weight.numel for each in weight.candidates] for weight in weights]


@torch.no_grad()
def costs_by_output(
    weights: Sequence[WeightCandidates],
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    bits: float,
    progress: bool = False,
) -> Costs:
    """Return the divergence of the output for every candidate of every weight. Call on all ranks.

    Args:
        weights: their candidates; the layers are modules of ``model``.
        model: the dense model, in eval mode.
        batches: keyword arguments of its forward.
        bits: approximate number of bits per weight of the result; candidates near it are measured.
        progress: show a progress bar.

    Raises:
        ValueError: if the model has no output to compare, no weight has an influence on it, or it
            is not finite with a quantized weight.
    """
    meter = SensitivityMeter(model, batches)
    progress_bar = tqdm(weights, desc="sensitivity", unit="weight", disable=not progress)
    measured = [_measure(weight, meter, bits) for weight in progress_bar]
    sensitivities = [
        interpolate(points, points[0][0]) / (points[0][0] * weight.numel)
        for weight, points in zip(weights, measured, strict=True)
        if points
    ]
    typical = median(sensitivities) if sensitivities else 0.0
    if not typical > 0:
        typical = max(sensitivities, default=0.0)
    if not typical > 0:
        raise ValueError(
            "cannot measure sensitivities: quantizing any one weight does not change the output on "
            "the calibration batches, so they do not reach the model's layers; pass other batches, "
            "or none"
        )

    def cost(points: list[tuple[float, float]], error: float, numel: int) -> float:
        divergence = interpolate(points, error) if points else 0.0
        return max(divergence, MIN_SENSITIVITY * typical * error * numel)

    return [
        [cost(points, each.error, weight.numel) for each in weight.candidates]
        for weight, points in zip(weights, measured, strict=True)
    ]


def _measure(
    weight: WeightCandidates, meter: SensitivityMeter, bits: float
) -> list[tuple[float, float]]:
    """Return (relative error, divergence) of the fitted candidates that are measured."""
    matrix = weight_matrix(weight.layers[0].module)
    energy = float(matrix.float().square().sum())
    points = []
    for candidate in _measured_candidates(weight, bits):
        quantized = candidate.quantize(matrix)
        error = float((matrix.float() - quantized.float()).square().sum()) / energy if energy else 0
        if error > 0:
            divergence = meter.measure(weight.layers, quantized)
            if not math.isfinite(divergence):  # max(0, NaN) is 0, which would count as harmless
                raise ValueError(
                    f"invalid sensitivity of {weight.name}: got a divergence of {divergence} with "
                    f"{candidate.short_name}, expected a finite value; use the model in "
                    "float32, check that its own output is finite, or exclude the layer "
                    "(exclude_modules)"
                )
            points.append((error, max(0.0, divergence)))
    return points


def _measured_candidates(weight: WeightCandidates, bits: float) -> list[Candidate]:
    """Return the candidates closest to a number of bits per weight, and to half of it."""
    nearest: dict[int, Candidate] = {}
    fitted = [candidate for candidate in weight.candidates if candidate.quantizer is not None]
    for target in (bits, bits / 2) if fitted else ():
        size = math.log(target * weight.numel / 8)
        candidate = min(fitted, key=lambda each, size=size: abs(math.log(each.bytes) - size))
        nearest[id(candidate)] = candidate
    return list(nearest.values())


def interpolate(points: list[tuple[float, float]], error: float) -> float:
    """Return the divergence at a quantization error.

    Between two measured points it is linear in logarithms, outside of them proportional to the
    error.
    """
    points = sorted(points)
    (low, first), (high, last) = points[0], points[-1]
    last = max(first, last)
    if error <= low or high <= low:
        return first * error / low
    if error >= high or not first:
        return last * error / high
    # In logarithms throughout: the quotient of two divergences may overflow.
    fraction = math.log(error / low) / math.log(high / low)
    return math.exp((1 - fraction) * math.log(first) + fraction * math.log(last))
