"""The ways one weight could be stored: bytes and quantization error of each, found cheaply.

Errors are those of fits to a sample of rows. k-means runs for a few numbers of centroids only:
between and beyond them ln(error) is taken as a straight line in ln K, as it is for a source whose
error falls by a fixed factor per bit of a code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...blocks import kernel_area, weight_matrix
from ...configuration import DENSE, OBSERVERS, IPQConfig
from ...quantizers import Quantizer, quantizer_from_dict
from ...quantizers.observers import extremes
from ...structure import LayerInfo

BLOCK_SIZES = range(2, 17)
CENTROIDS = tuple(2**bits for bits in range(4, 13))
BITS = range(2, 9)
# The search for a narrower range costs a small weight as much as a large one, and pays where there
# are few levels.
SEARCHED_BITS, SEARCHED_NUMBERS = 4, 2**14

# What is fitted, on so many numbers of a weight.
FITTED_CENTROIDS = (16, 64, 256)
SAMPLE_NUMBERS = 2**16
TRIAL_ITERATIONS = 6
# Bytes of a tensor's entry in the file's header, beside its name.
HEADER_ENTRY = 72


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight.

    Attributes:
        settings: of the quantizer, as in a plan; ``{"scheme": "dense"}`` leaves the weight.
        bytes: its tensors in the file, and about what they take in its header.
        error: expected ||W - W_q||^2 / ||W||^2.
        short_name: for tables.
    """

    settings: dict[str, Any]
    bytes: int
    error: float
    short_name: str


@dataclass(frozen=True)
class Trial:
    """A candidate that was fitted: it can be put in the model's place.

    Attributes:
        candidate: what was fitted.
        quantizer: with few iterations.
        state: fitted to a sample; None where it must be fitted to the whole weight.
    """

    candidate: Candidate
    quantizer: Quantizer
    state: dict[str, Tensor] | None

    def quantized(self, matrix: Tensor) -> Tensor:
        """The whole weight (rows, columns) as this candidate would store it."""
        state = self.quantizer.fit(matrix) if self.state is None else self.state
        return self.quantizer.quantize(matrix, state)


@dataclass(frozen=True)
class WeightChoices:
    """All candidates of one weight.

    Attributes:
        members: the layers that hold it.
        candidates: ways to store it, the dense one among them.
        trials: the fitted ones.
    """

    members: tuple[LayerInfo, ...]
    candidates: list[Candidate]
    trials: list[Trial] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the first layer."""
        return self.members[0].name

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.members[0].numel


@torch.no_grad()
def choices_for(
    members: tuple[LayerInfo, ...], config: IPQConfig, with_errors: bool = True
) -> WeightChoices:
    """The candidates of one weight: block sizes that divide its columns (for a convolution the
    kernel's area, section 7.8) with 16 to 4,096 centroids, int2 to int8, and floating point.

    Args:
        members: the layers that hold it.
        config: gives precision of centroids, k-means iterations and seed.
        with_errors: False counts bytes alone, of shapes without memory too.

    Raises:
        ValueError: if the weight has entries that are not finite.
    """
    layer = members[0]
    weight = layer.module.weight
    dense = Candidate({"scheme": DENSE}, weight.numel() * weight.element_size(), 0.0, DENSE)
    found = WeightChoices(members, [_with_header(dense, layer, 1)])
    sampled = _Sample(weight_matrix(layer.module), config.seed) if with_errors else None
    plain = replace(config, block_size=4, n_centroids=256, layer_quantizers={})
    base = plain.quantizer_settings(layer)
    area = kernel_area(layer.module)
    for size in [area] if area > 1 else BLOCK_SIZES:
        curve: list[tuple[float, float]] = []
        for centroids in CENTROIDS:
            settings = {**base, "block_size": size, "n_centroids": centroids}
            quantizer = quantizer_from_dict(settings)
            if quantizer.check(layer.rows, layer.columns) is not None:
                continue
            trial = None
            if sampled is not None and (centroids in FITTED_CENTROIDS or not curve):
                trial = sampled.fit_codebook(quantizer, curve)
            error = sampled.error_of(curve, quantizer) if sampled is not None else 0.0
            _add(found, settings, quantizer, dense.bytes, error, trial)
    for bits in BITS:
        searched = bits <= SEARCHED_BITS and found.numel >= SEARCHED_NUMBERS
        for observer in ("histogram" if searched else "minmax", "channel"):
            settings = {"scheme": "int", "bits": bits, "observer": observer}
            quantizer = quantizer_from_dict(settings)
            error = sampled.error_of_range(quantizer) if sampled is not None else 0.0
            _add(found, settings, quantizer, dense.bytes, error, (quantizer, None))
    return found


def _add(
    found: WeightChoices,
    settings: dict[str, Any],
    quantizer: Quantizer,
    dense_bytes: int,
    error: float,
    trial: tuple[Quantizer, dict[str, Tensor] | None] | None,
) -> None:
    layer = found.members[0]
    size = quantizer.packed_bytes(layer.rows, layer.columns)
    if size >= dense_bytes:
        return  # the plan would leave it dense
    candidate = Candidate(settings, size, error, quantizer.short_name)
    tensors = 1 + len(quantizer.state_spec(layer.rows, layer.columns))
    found.candidates.append(_with_header(candidate, layer, tensors))
    if trial is not None:
        found.trials.append(Trial(found.candidates[-1], *trial))


def _with_header(candidate: Candidate, layer: LayerInfo, tensors: int) -> Candidate:
    header = tensors * (len(layer.name) + HEADER_ENTRY)
    return replace(candidate, bytes=candidate.bytes + header)


class _Sample:
    """Some rows of a weight, and the errors of fits to them."""

    def __init__(self, matrix: Tensor, seed: int) -> None:
        rows, columns = matrix.shape
        self.seed, self.numel = seed, matrix.numel()
        self.range = extremes(matrix.float())
        count = max(1, SAMPLE_NUMBERS // columns)
        if rows > count:
            generator = torch.Generator().manual_seed(seed)
            matrix = matrix[torch.randperm(rows, generator=generator)[:count].to(matrix.device)]
        self.rows = matrix.float().contiguous()
        self.energy = float(self.rows.double().square().sum())

    def _error(self, quantizer: Quantizer, state: dict[str, Tensor]) -> float:
        difference = (self.rows - quantizer.quantize(self.rows, state)).double().square().sum()
        return float(difference) / self.energy if self.energy else 0.0

    def fit_codebook(
        self, quantizer: Quantizer, curve: list[tuple[float, float]]
    ) -> tuple[Quantizer, dict[str, Tensor]] | None:
        """Fits centroids and adds (ln K, ln error) to a curve, the error being that of unseen
        blocks; None where the sample has too few blocks for K.

        The mean of m points is nearer to them than their expectation is, by a factor of 1 - 1/m.
        """
        size, count = quantizer.block_size, quantizer.n_centroids
        blocks = self.rows.reshape(-1, size)
        if len(blocks) <= count:
            return None
        trial = replace(quantizer, n_iter=min(quantizer.n_iter, TRIAL_ITERATIONS))
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randperm(len(blocks), generator=generator)[:count].to(blocks.device)
        state = trial.fit(self.rows, seed=self.seed, init={"codebook": blocks[start]})
        error = self._error(trial, state) / (1 - count / len(blocks))
        curve.append((math.log(count), math.log(max(error, 1e-12))))
        return trial, state

    def error_of(self, curve: list[tuple[float, float]], quantizer: Quantizer) -> float:
        """The error expected with a quantizer's number of centroids, fitted to all blocks."""
        if not curve:
            return 1.0
        blocks = self.numel / quantizer.block_size
        place = math.log(quantizer.n_centroids)
        if len(curve) == 1:
            (start, error), slope = curve[0], -2 / quantizer.block_size
        else:
            pairs = list(zip(curve, curve[1:], strict=False))
            left, right = next((p for p in pairs if place <= p[1][0]), pairs[-1])
            (start, error), slope = right, (right[1] - left[1]) / (right[0] - left[0])
        unseen = math.exp(error + min(slope, 0.0) * (place - start))
        return min(1.0, unseen * (1 - quantizer.n_centroids / blocks))

    def error_of_range(self, quantizer: Quantizer) -> float:
        """The error of intN, whose range is that of the whole weight."""
        observer = OBSERVERS[quantizer.observer]
        if observer.per_channel or observer.running:
            state, _ = quantizer.fit_running(self.rows, self.range)
        else:
            state = quantizer.state_of_range(*self.range)
        return self._error(quantizer, state)
