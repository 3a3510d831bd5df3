"""The operator psi of Eq. 6 and 7: a weight with the noise of this forward, straight through.

The weight itself is never written: noise falls on a copy, whose gradient goes to the weight as if
it had been used itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..layer_types import LayerType
from .block_mask import BlockMask, SharedMaskSampler, draw
from .functions import NoiseFunction


class StraightThrough(torch.autograd.Function):
    """Noisy values forward, identity backward (the STE of section 4.1). Saves nothing."""

    @staticmethod
    def forward(ctx, weight: Tensor, noisy: Tensor) -> Tensor:
        return noisy.view_as(noisy)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def _full_precision(device: torch.device) -> AbstractContextManager:
    # Autocast would look for nearest centroids in half precision, and find others.
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class WeightNoise:
    """psi for one weight: its noise functions in order (Eq. 8), each with its own J.

    Args:
        functions: (number of the noise in the config, noise function) in order.
        rates: rate of each noise of the config; one list for the whole model, changed in place.
        rows, columns: shape of the weight matrix.
        members: number of layers that hold the weight.

    Attributes:
        used: whether it has fallen on the weight in any forward yet.
    """

    used: bool = False

    def __init__(
        self,
        functions: list[tuple[int, NoiseFunction]],
        rates: list[float],
        rows: int,
        columns: int,
        members: int = 1,
    ) -> None:
        self.functions = functions
        self.rates = rates
        self.rows, self.columns = rows, columns
        self.shared = SharedMaskSampler(members) if members > 1 else None

    @property
    def active(self) -> bool:
        """Whether any noise has a rate above zero."""
        return any(self.rates[number] > 0 for number, _ in self.functions)

    def reached(self, member: int) -> bool:
        """Whether it has fallen on the weight in a forward of one of its layers yet."""
        return self.used if self.shared is None else member in self.shared.met

    def noisy_weight(self, weight: Tensor, layout: LayerType, member: int = 0) -> Tensor:
        """The weight as this forward sees it (Eq. 7), in the weight's own layout and dtype.

        Args:
            weight: the clean weight.
            layout: how it becomes a matrix.
            member: number of the layer among those that hold the weight.

        Raises:
            RuntimeError: if the weight's shape is not that of the noise any more.
        """
        if not self.active:
            return weight
        self.used = True
        with torch.no_grad(), _full_precision(weight.device):
            matrix = layout.to_matrix(weight.detach())
            self._check_shape(tuple(matrix.shape))
            copy = matrix.clone(memory_format=torch.contiguous_format)
            for function, selection in self._draws(self.rows, weight.device, member):
                function.distort(copy, _blocks_of(function, selection))
            noisy = layout.from_matrix(copy, weight.shape)
        return StraightThrough.apply(weight, noisy)

    def noisy_rows(self, values: Tensor, ids: Tensor, member: int = 0) -> Tensor:
        """Looked-up rows with noise: a row that occurs twice gets the same noise twice.

        Args:
            values: the clean rows, shape (*ids.shape, columns).
            ids: which rows they are, any shape.
            member: number of the layer among those that hold the weight.
        """
        if not self.active:
            return values
        self.used = True
        flat = ids.reshape(-1)
        with torch.no_grad(), _full_precision(values.device):
            copy = values.detach().reshape(-1, self.columns).clone()
            if self.shared is None:
                for function, selection in self._draws(flat.numel(), values.device, member):
                    function.distort(copy, _blocks_of(function, selection, flat), rows=flat)
                copy = copy[_first_occurrences(flat, self.rows)]
            else:
                # The head that holds the same weight needs J for all rows anyway.
                for function, selection in self._draws(self.rows, values.device, member):
                    if not function.by_cluster:
                        selection = selection.of_rows(flat, self.columns // function.block_size)
                    function.distort(copy, _blocks_of(function, selection, flat), rows=flat)
        return StraightThrough.apply(values, copy.view(values.shape))

    def _draws(
        self, rows: int, device: torch.device, member: int
    ) -> Iterator[tuple[NoiseFunction, BlockMask]]:
        active = [(f, self.rates[number]) for number, f in self.functions if self.rates[number] > 0]
        sizes = [(f.n_choices(rows * (self.columns // f.block_size)), p) for f, p in active]
        if self.shared is not None:
            selections = self.shared.draw(member, sizes, device)
        else:
            selections = [draw(count, p, device) for count, p in sizes]
        return zip([f for f, _ in active], selections, strict=True)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != (self.rows, self.columns):
            raise RuntimeError(
                f"the noise was made for a {self.rows} x {self.columns} weight matrix, which is "
                f"{' x '.join(map(str, shape))} now (resized embeddings?): call "
                "remove_quant_noise(model), then apply_quant_noise(model, config)"
            )


def _blocks_of(
    function: NoiseFunction, selection: BlockMask, rows: Tensor | None = None
) -> BlockMask:
    """J over blocks: where whole clusters were drawn, the blocks that belong to them."""
    if not function.by_cluster:
        return selection
    codes = function.state["codes"]
    return selection.of_clusters(codes if rows is None else codes[rows])


def _first_occurrences(ids: Tensor, rows: int) -> Tensor:
    """For each entry of ids (n,) the place where its value stands first: one J per distinct row,
    without the sort (and on a GPU the wait) that ``torch.unique`` takes."""
    places = torch.arange(ids.numel(), device=ids.device)
    first = torch.empty(rows, dtype=places.dtype, device=ids.device)
    first.scatter_reduce_(0, ids.long(), places, "amin", include_self=False)
    return first[ids]
