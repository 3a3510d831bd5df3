"""The cost of each candidate: how much the model's output changes if one weight is stored that way.

With calibration batches, it is the divergence between the outputs of the model with one quantized
weight and of the dense model: that of distillation, or the relative error of outputs that
distillation cannot compare. This is measured for two candidates of each weight and interpolated for
the others by their quantization error: for small errors the divergence grows with ||W - W_q||^2,
because its gradient is zero at the dense model. Without batches, the cost is the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from ...argument_checks import run_batch
from ...blocks import weight_matrix
from ...distributed import raise_on_all_ranks, sum_over_ranks
from ...quantizers.base import sum_of_squares
from ...structure import LayerInfo
from ..distillation.logits import HEADS, head_name
from .candidates import Candidate, WeightCandidates

# A few batches do not reach every token and path, so the sensitivity of each weight is at least
# this fraction of the median.
MIN_SENSITIVITY = 0.01


def comparable_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return the outputs of a forward to compare: all predictions, or without any the first float.

    Predictions are logits and, in object detection, ``pred_boxes``.
    """
    named = dict(outputs) if isinstance(outputs, Mapping) else dict(enumerate(outputs))
    tensors = [
        (str(name), value)
        for name, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    ]
    if not tensors:
        raise ValueError(
            f"cannot measure sensitivities: the model's output has neither logits nor hidden "
            f"states (got {list(named)}); pass no calibration batches to use quantization errors"
        )
    predictions = {
        name: value
        for name, value in tensors
        if name.endswith("logits") or name.startswith("pred_")
    }
    return predictions or dict(tensors[:1])


def output_divergence(
    model: nn.Module,
    outputs: dict[str, Tensor],
    reference: dict[str, Tensor],
    batch: Mapping[str, Any],
) -> float:
    """Return the divergence of distillation, or the relative error of heads that it does not know.

    The relative errors of all outputs are added.
    """
    if (head := head_name(model, batch)) in HEADS:
        with suppress(KeyError):  # the head of an unknown class, or a model without a head
            return float(HEADS[head](outputs, reference, batch, 1.0))
    total = 0.0
    for name, output in outputs.items():
        target = reference[name].float()
        error = (output.float() - target).square().mean()
        total += float(error / target.square().mean().clamp(min=1e-30))
    return total


@contextmanager
def _same_random_values() -> Iterator[None]:
    """Forwards in this context draw the same random values, e.g. the masks of ViTMAE."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class SensitivityMeter:
    """Measures how much the output changes if one weight is replaced.

    In a distributed run all ranks measure together, each with its own batches, or none. The model
    is in eval mode and not changed.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.batches = model, batches
        with raise_on_all_ranks():
            self.reference = []
            for batch in batches:
                with _same_random_values():
                    outputs = run_batch(model, batch, "batches")
                self.reference.append(comparable_outputs(outputs))

    def measure(self, layers: Sequence[LayerInfo], matrix: Tensor) -> float:
        """Return the mean divergence over the batches of all ranks with a replaced weight.

        ``layers`` hold the weight; ``matrix``, of shape (rows, columns), replaces it.
        """
        weight = layers[0].module.weight
        values = layers[0].layer_type.from_matrix(matrix, weight.shape).to(weight.dtype)
        replaced = {f"{layer.name}.weight": values for layer in layers}
        divergences = []
        for batch, reference in zip(self.batches, self.reference, strict=True):
            with _same_random_values():
                outputs = comparable_outputs(functional_call(self.model, replaced, (), dict(batch)))
            divergences.append(output_divergence(self.model, outputs, reference, batch))
        sums = torch.tensor([sum(divergences), len(divergences)], dtype=torch.float64)
        total, count = sum_over_ranks(sums).tolist()
        return total / count


@torch.no_grad()
def costs_by_output(
    weights: Sequence[WeightCandidates],
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    bits: float,
    progress: bool = False,
) -> list[list[float]]:
    """Return the divergence of the output for every candidate of every weight. Call on all ranks.

    ``weights`` are layers of the dense model, in eval mode. ``bits`` is the approximate number of
    bits per weight of the result; candidates near it are measured.
    """
    meter = SensitivityMeter(model, batches)
    progress_bar = tqdm(
        weights, desc="sensitivity", unit="weight", disable=not progress, leave=False
    )
    measured = [_measure(weight, meter, bits) for weight in progress_bar]
    sensitivities = [
        interpolate(points, points[0][0]) / (points[0][0] * weight.layer.numel)
        for weight, points in zip(weights, measured, strict=True)
        if points
    ]
    typical = median(sensitivities or [0.0]) or max(sensitivities, default=0.0)
    if not typical:
        raise ValueError(
            "cannot measure sensitivities: quantizing any one weight does not change the output on "
            "the calibration batches, so they do not reach the model's layers; pass other batches, "
            "or none"
        )

    def cost(points: list[tuple[float, float]], error: float, numel: int) -> float:
        divergence = interpolate(points, error) if points else 0.0
        return max(divergence, MIN_SENSITIVITY * typical * error * numel)

    return [
        [cost(points, each.error, weight.layer.numel) for each in weight.candidates]
        for weight, points in zip(weights, measured, strict=True)
    ]


def _measure(
    weight: WeightCandidates, meter: SensitivityMeter, bits: float
) -> list[tuple[float, float]]:
    """Return (relative error, divergence) of the fitted candidates that are measured."""
    matrix = weight_matrix(weight.layer.module)
    energy = sum_of_squares(weight.weighted(matrix))
    points = []
    for candidate in _measured_candidates(weight, bits):
        state = candidate.state or candidate.quantizer.fit(matrix)
        quantized = candidate.quantizer.quantize(matrix, state)
        error = sum_of_squares(weight.weighted(matrix), weight.weighted(quantized))
        error = error / energy if energy else 0
        if error > 0:
            divergence = meter.measure(weight.layers, quantized)
            if not math.isfinite(divergence):  # max(0, NaN) is 0, which would count as harmless
                raise ValueError(
                    f"invalid sensitivity of {weight.layer.name}: got a divergence of {divergence} "
                    f"with {candidate.short_name}, expected a finite value; use the model in "
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
        size = math.log(target * weight.layer.numel / 8)
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
