"""Ways to store one weight, with the size and an estimate of the quantization error of each.

Errors are measured on a sample of rows. k-means runs for a few codebook sizes only. For other sizes
ln(error) is interpolated linearly in ln K, which is exact for a source whose error falls by a fixed
factor per bit of a code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...blocks import weight_matrix
from ...configuration import DENSE, OBSERVERS, IPQConfig
from ...configuration.row_groups import in_row_groups
from ...modeling.plan import HEADER_ENTRY
from ...quantizers import (
    FixedPointQuantizer,
    ProductQuantizer,
    Quantizer,
    RowGroupQuantizer,
    quantizer_from_dict,
)
from ...quantizers.observers import extremes
from ...quantizers.packing import unpack_codes
from ...structure import LayerInfo

BLOCK_SIZES = range(2, 17)
# Of frequent and rare rows, if the config has groups of rows.
GROUP_BLOCK_SIZES = ((2, 8), (2, 16), (2, 32), (4, 8), (4, 16), (4, 32), (8, 16), (8, 32))
CENTROIDS = tuple(2**bits for bits in range(4, 13))
BITS = range(2, 9)
# The histogram observer's search for a narrower range takes as long for a small weight as for a
# large one, and helps at low bit widths only.
SEARCH_MAX_BITS, SEARCH_MIN_WEIGHTS = 4, 2**14

# Codebook sizes that are fitted, on a sample of this many weights, with this many iterations.
FITTED_CENTROIDS = (16, 64, 256)
SAMPLE_SIZE = 2**16
SAMPLE_ITERATIONS = 6

# (ln K, ln error on unseen blocks) of the codebooks fitted so far, by increasing K.
Curve = list[tuple[float, float]]
Fitted = tuple[Quantizer | None, dict[str, Tensor] | None]
Evaluated = tuple[float, Quantizer | None, dict[str, Tensor] | None]


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight.

    Attributes:
        settings: of the quantizer, as in a plan; ``{"scheme": "dense"}`` for none.
        bytes: size of its tensors in the file, with an estimate of their header entries.
        error: expected ||W - W_q||^2 / ||W||^2, with the rows weighted by ``row_weights``.
        short_name: for tables.
        quantizer: a quantizer that can be measured; None if the error is interpolated.
        state: its state, fitted to a sample; None if it has to be fitted to the full weight.
    """

    settings: dict[str, Any]
    bytes: int
    error: float
    short_name: str
    quantizer: Quantizer | None = None
    state: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class WeightCandidates:
    """The layers that hold a weight, and the ways to store it; the first one is dense.

    ``row_weights``, shape (rows,), are those of the squared errors of a table whose rows can be
    stored in groups: the number of lookups, and one for unseen words.
    """

    layers: tuple[LayerInfo, ...]
    candidates: list[Candidate]
    row_weights: Tensor | None = None

    @property
    def layer(self) -> LayerInfo:
        """The first layer."""
        return self.layers[0]

    def weighted(self, matrix: Tensor) -> Tensor:
        """Return a matrix times the roots of the row weights, for weighted squares."""
        return matrix if self.row_weights is None else matrix * self.row_weights.sqrt()[:, None]


@torch.no_grad()
def candidates_for(
    layers: tuple[LayerInfo, ...],
    config: IPQConfig,
    with_errors: bool = True,
    lookups: Tensor | None = None,
) -> WeightCandidates:
    """Return the candidates for one weight.

    They are product quantization with 16 to 4,096 centroids and every block size that divides the
    columns (for a convolution its kernel or a row of it, section 7.8), int2 to int8, and floating
    point; with ``frequent_rows`` also groups of rows, for which errors need the lookups of each
    row. The config sets the precision of centroids, the k-means iterations and the seed. Sizes
    alone (``with_errors=False``) can also be computed on the meta device.
    """
    layer, weight = layers[0], layers[0].module.weight
    entry, dense = len(layer.name) + HEADER_ENTRY, weight.numel() * weight.element_size()
    candidates = [Candidate({"scheme": DENSE}, dense + entry, 0.0, DENSE)]
    row_weights = None if lookups is None else lookups.to(weight.device) + 1.0
    sample = _sample(layer, config, row_weights) if with_errors else None
    for settings in _settings_of(layer, config):
        quantizer = quantizer_from_dict(settings)
        if quantizer.check(layer.rows, layer.columns) is not None:
            continue
        error, *fitted = (0.0, None, None) if sample is None else sample.evaluate(quantizer)
        size = quantizer.packed_bytes(layer.rows, layer.columns)
        if size < dense:  # larger ones would be kept dense
            size += entry * (1 + len(quantizer.state_spec(layer.rows, layer.columns)))
            candidates.append(Candidate(settings, size, error, quantizer.short_name, *fitted))
    return WeightCandidates(layers, candidates, row_weights)


def _settings_of(layer: LayerInfo, config: IPQConfig) -> Iterator[dict[str, Any]]:
    changes = {"block_size": 4, "n_centroids": 256, "layer_quantizers": {}, "frequent_rows": None}
    base = replace(config, **changes).quantizer_settings(layer) or {}
    if not layer.module.weight.is_meta:
        base = quantizer_from_dict(base).for_values(weight_matrix(layer.module)).to_dict()
    block = layer.layer_type.kernel_block(layer.module)
    for size in [block] if block > 1 else BLOCK_SIZES:
        for centroids in CENTROIDS:
            yield {**base, "block_size": size, "n_centroids": centroids}
    for size, rare_size in GROUP_BLOCK_SIZES:
        for centroids in CENTROIDS:
            settings = {**base, "block_size": size, "n_centroids": centroids}
            grouped = in_row_groups(settings, layer, config.frequent_rows, rare_size)
            if grouped is not settings:
                yield grouped
    for bits in BITS:
        search = bits <= SEARCH_MAX_BITS and layer.numel >= SEARCH_MIN_WEIGHTS
        for observer in ("histogram" if search else "minmax", "channel"):
            yield {"scheme": "int", "bits": bits, "observer": observer}


def _sample(
    layer: LayerInfo, config: IPQConfig, row_weights: Tensor | None
) -> _WeightSample | _TableSample:
    matrix = weight_matrix(layer.module)
    settings = {"scheme": "pq", "block_size": 1, "n_centroids": 2}
    quantizer = quantizer_from_dict(in_row_groups(settings, layer, config.frequent_rows, 1))
    if row_weights is None or not isinstance(quantizer, RowGroupQuantizer):
        return _WeightSample(matrix, config.seed)
    return _TableSample(matrix, config.seed, quantizer.row_groups_of(row_weights), row_weights)


class _TableSample:
    """Samples of both groups of rows of a table, whose errors are weighted by lookups."""

    def __init__(self, matrix: Tensor, seed: int, row_groups: Tensor, weights: Tensor) -> None:
        self.row_groups = row_groups
        is_rare = unpack_codes(row_groups, 1, len(matrix)).bool()
        energy = weights.double() * matrix.double().square().sum(1)
        self.rare_share = float(energy[is_rare].sum() / energy.sum().clamp(min=1e-300))
        self.groups = [_WeightSample(matrix[rows], seed) for rows in (~is_rare, is_rare)]

    def evaluate(self, quantizer: Quantizer) -> Evaluated:
        """As :meth:`_WeightSample.evaluate`."""
        if isinstance(quantizer, RowGroupQuantizer):
            first, second = quantizer.parts
        else:
            first = second = quantizer
        frequent, fitted, state = self.groups[0].evaluate(first)
        rare, _, rare_state = self.groups[1].evaluate(second)
        error = (1 - self.rare_share) * frequent + self.rare_share * rare
        if not isinstance(quantizer, RowGroupQuantizer):
            return error, fitted, state
        if state is None or rare_state is None:
            return error, None, None
        joined = quantizer.join_states([state, rare_state])
        return error, quantizer, {**joined, "row_groups": self.row_groups}


class _WeightSample:
    """A sample of the rows of a weight, and the errors of quantizers fitted to it."""

    def __init__(self, matrix: Tensor, seed: int) -> None:
        rows, columns = matrix.shape
        self.seed, self.numel = seed, matrix.numel()
        self.range = extremes(matrix.float())
        count = max(1, SAMPLE_SIZE // columns)
        if rows > count:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(rows, generator=generator, device="cpu")
            matrix = matrix[order[:count].to(matrix.device)]
        self.rows = matrix.float().contiguous()
        self.energy = float(self.rows.double().square().sum())
        self.curves: dict[int, Curve] = defaultdict(list)  # by block size

    def evaluate(self, quantizer: Quantizer) -> Evaluated:
        """Return the expected error, and the ``quantizer`` and ``state`` of a candidate.

        Evaluate smaller codebooks first, since larger ones are interpolated from them.
        """
        if not isinstance(quantizer, ProductQuantizer):
            return self._fixed_point_error(quantizer), quantizer, None
        curve, fitted = self.curves[quantizer.block_size], (None, None)
        if quantizer.n_centroids in FITTED_CENTROIDS or not curve:
            fitted = self._fit_codebook(quantizer, curve)
        return self._codebook_error(quantizer, curve), *fitted

    def _error(self, quantizer: Quantizer, state: dict[str, Tensor]) -> float:
        difference = (self.rows - quantizer.quantize(self.rows, state)).double().square().sum()
        return float(difference) / self.energy if self.energy else 0.0

    def _fit_codebook(self, quantizer: ProductQuantizer, curve: Curve) -> Fitted:
        """Fit centroids and add a point to the curve, unless the sample has too few blocks."""
        size, count = quantizer.block_size, quantizer.n_centroids
        blocks = self.rows.reshape(-1, size)
        if len(blocks) <= count:
            return None, None
        fast = replace(quantizer, n_iter=min(quantizer.n_iter, SAMPLE_ITERATIONS))
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(blocks), generator=generator, device="cpu")
        start = order[:count].to(blocks.device)
        state = fast.fit(self.rows, seed=self.seed, init={"codebook": blocks[start]})
        # A mean of m points is closer to them than to unseen points, by a factor of 1 - 1/m.
        error = self._error(fast, state) / (1 - count / len(blocks))
        curve.append((math.log(count), math.log(max(error, 1e-12))))
        return fast, (None if quantizer.row_scale else state)  # scales are of the sampled rows

    def _codebook_error(self, quantizer: ProductQuantizer, curve: Curve) -> float:
        """Return the expected error of a codebook that is fitted to all blocks."""
        if not curve:
            return 1.0
        blocks = self.numel / quantizer.block_size
        x = math.log(quantizer.n_centroids)
        if len(curve) == 1:
            (start, error), slope = curve[0], -2 / quantizer.block_size
        else:
            pairs = list(pairwise(curve))
            left, right = next((pair for pair in pairs if x <= pair[1][0]), pairs[-1])
            (start, error), slope = right, (right[1] - left[1]) / (right[0] - left[0])
        unseen = math.exp(error + min(slope, 0.0) * (x - start))
        return min(1.0, unseen * (1 - quantizer.n_centroids / blocks))

    def _fixed_point_error(self, quantizer: FixedPointQuantizer) -> float:
        """Return the error of intN on the sample, with the range of the full weight."""
        observer = OBSERVERS[quantizer.observer]
        if observer.per_channel or observer.running:
            state, _ = quantizer.fit_running(self.rows, self.range)
        else:
            state = quantizer.state_of_range(*self.range)
        return self._error(quantizer, state)
