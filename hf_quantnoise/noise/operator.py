"""The operator psi of Eq. 6 and 7: the weight with the noise of one forward, straight-through.

The weight itself is never written. Noise is applied to a copy, whose gradient is passed to the
weight unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layer_types import LayerType
from ..quantizers.base import StraightThrough
from .block_mask import BlockMask, SharedMaskSampler, sample_mask
from .functions import NoiseFunction, ProductNoise
from .trained_centroids import TrainedBlocks, straight_through_both


@dataclass(eq=False)
class WeightNoise:
    """psi for one weight: its noise functions in order (Eq. 8), each with its own J.

    ``functions`` are paired with the index of the noise in the config; ``rates`` are those of all
    noises of the config, and are set by ``QuantNoiseState.p``.
    """

    functions: list[tuple[int, NoiseFunction]]
    rates: list[float]  # a list: torch.compile would compile a graph for each value in a tuple
    rows: int
    columns: int
    members: int = 1  # number of layers that hold the weight
    used: bool = False  # whether any forward has applied it yet

    def __post_init__(self) -> None:
        self.shared = SharedMaskSampler(self.members) if self.members > 1 else None

    @property
    def active(self) -> bool:
        """Whether any noise has a rate above zero."""
        return any(self.rates[index] > 0 for index, _ in self.functions)

    def reached(self, member: int) -> bool:
        """Return whether a forward of this layer has applied it yet."""
        return self.used if self.shared is None else member in self.shared.called

    def require_shape(self, shape: Sequence[int]) -> None:
        """Raise a RuntimeError if this is not the shape that the weight matrix had so far."""
        if tuple(shape) != (self.rows, self.columns):
            raise RuntimeError(
                f"invalid weight matrix: got {tuple(shape)}, expected {(self.rows, self.columns)} "
                "as when the noise was applied (resized embeddings?); call "
                "remove_quant_noise(model), then apply_quant_noise(model, config)"
            )

    def noisy_weight(self, weight: Tensor, layer_type: LayerType, member: int = 0) -> Tensor:
        """Return the weight with noise (Eq. 7), in its own layout and dtype.

        ``member`` is the index of the layer among those that hold the weight.

        Raises:
            RuntimeError: if the weight was resized.
        """
        if _in_inference_mode():
            # Autograd cannot save inference tensors, and the noise keeps some for later forwards.
            with torch.inference_mode(False), torch.no_grad():
                return self.noisy_weight(weight, layer_type, member)
        self.used = True
        # Autocast would search the nearest centroids in half precision, with other results.
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            matrix = layer_type.to_matrix(weight.detach())
            self.require_shape(matrix.shape)
            copy = matrix.clone(memory_format=torch.contiguous_format)
            trained = None
            for function, chosen in self._sample(self.rows, weight.device, member):
                blocks = function.as_blocks(chosen, copy.device)
                trained = _distort(function, copy, blocks) or trained
        if trained is None:
            return StraightThrough.apply(weight, layer_type.from_matrix(copy, weight.shape))
        matrix = straight_through_both(layer_type.to_matrix(weight), copy, trained)
        return layer_type.from_matrix(matrix, weight.shape)

    def noisy_rows(
        self, values: Tensor, ids: Tensor, member: int = 0, padding_idx: int | None = None
    ) -> Tensor:
        """Return looked-up rows with noise; a repeated row gets the same noise each time.

        ``values`` are the rows without noise, shape (*ids.shape, columns). Row ``padding_idx``
        trains no centroids, as in a lookup in the complete table.
        """
        if _in_inference_mode():  # as in noisy_weight
            with torch.inference_mode(False), torch.no_grad():
                return self.noisy_rows(values, ids.clone(), member, padding_idx)
        self.used = True
        flat, tied = ids.reshape(-1), self.shared is not None
        # If tied, the head needs J for all rows anyway.
        n_rows = self.rows if tied else flat.numel()
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
            copy = values.detach().reshape(-1, self.columns).clone()
            trained = None
            for function, chosen in self._sample(n_rows, values.device, member):
                if tied and function.n_clusters is None:
                    chosen = chosen.select_rows(flat, self.columns // function.block_size)
                blocks = function.as_blocks(chosen, copy.device, flat)
                trained = _distort(function, copy, blocks, flat) or trained
            if not tied:
                copy = copy[first := _first_occurrences(flat, self.rows)]
                trained = trained and trained.of_rows(first)
        if trained is None:
            noisy = StraightThrough.apply(values, copy.view(values.shape))
        else:
            if padding_idx is not None:
                trained = trained.without_rows(flat == padding_idx)
            matrix = values.reshape(copy.shape)
            noisy = straight_through_both(matrix, copy, trained).view(values.shape)
        # A copy, since the model may change the rows in place: autograd refuses that for views made
        # in a custom function, and the dense layer gives no view.
        return noisy.clone()

    def _sample(
        self, rows: int, device: torch.device, member: int
    ) -> Iterator[tuple[NoiseFunction, BlockMask]]:
        """Yield each noise with a rate above zero, and its J over a matrix of ``rows`` rows."""
        active = [(f, self.rates[index]) for index, f in self.functions if self.rates[index] > 0]
        sizes = [(f.n_clusters or rows * (self.columns // f.block_size), p) for f, p in active]
        if self.shared is not None:
            masks = self.shared.sample_masks(member, sizes, device)
        else:
            masks = [sample_mask(count, p, device) for count, p in sizes]
        return zip([f for f, _ in active], masks, strict=True)


def _in_inference_mode() -> bool:
    # Dynamo breaks the graph at torch's function.
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def _distort(
    function: NoiseFunction, matrix: Tensor, chosen: BlockMask, rows: Tensor | None = None
) -> TrainedBlocks | None:
    """Apply a noise function in place; return what it trains, if it does."""
    if not isinstance(function, ProductNoise) or not function.learns:
        function.distort(matrix, chosen, rows)
        return None
    with torch.enable_grad():
        decoded = function.decode(matrix.device, rows)
    function.replace(matrix, chosen, decoded.detach())
    return TrainedBlocks(decoded, chosen, function.block_size)


def _first_occurrences(ids: Tensor, rows: int) -> Tensor:
    """Return, for each entry of ids (n,), the first position with the same value."""
    # Without the sort, and on a GPU the synchronization, of torch.unique.
    positions = torch.arange(ids.numel(), device=ids.device)
    first = torch.empty(rows, dtype=positions.dtype, device=ids.device)
    first.scatter_reduce_(0, ids.long(), positions, "amin", include_self=False)
    return first[ids]
