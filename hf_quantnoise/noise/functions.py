"""The noise functions phi of section 4, which replace the blocks in J.

``"pq"`` and ``"intN"`` are the package's quantizers applied to some of the blocks, so noise and
storage cannot disagree. A new noise is a registered subclass of :class:`NoiseFunction`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..blocks import to_blocks
from ..configuration import NOISES, QuantNoiseConfig
from ..distributed import broadcast_from_rank_0
from ..quantizers import (
    FixedPointQuantizer,
    ProductQuantizer,
    RowGroupQuantizer,
    quantizer_from_dict,
)
from ..quantizers.refit import fit_or_follow
from .block_mask import BlockMask


class NoiseFunction(ABC):
    """phi for one weight (tied layers share it).

    Args:
        name: the name it is registered under.
        config: the noise config.
        block_size: elements per block of this weight.
        n_centroids: size of its codebook, for noises that have one.

    Attributes:
        reads_block_size: False if the noise works on single weights.
        zeroes: whether it sets blocks to zero.
        learns: whether its state is trained (:class:`ProductNoise`).
        n_clusters: with ``block_selection="cluster"`` the number of clusters that J is sampled
            from; None if J is sampled from the blocks.
        refreshed: which refresh updates its state: ``"codebooks"``, ``"scales"`` or None.
        state: fitted tensors. They are not buffers, so the model's ``state_dict`` is unchanged.
    """

    reads_block_size: ClassVar[bool] = True
    zeroes: ClassVar[bool] = False
    learns: bool = False
    n_clusters: int | None = None
    refreshed: str | None = None

    def __init__(
        self, name: str, config: QuantNoiseConfig, block_size: int, n_centroids: int
    ) -> None:
        self.block_size = block_size if self.reads_block_size else 1
        self.block_sizes: tuple[int, ...] = (self.block_size,)  # of groups of rows
        self.state: dict[str, Tensor] = {}

    def check(self, rows: int, columns: int) -> str | None:
        """Return why the noise cannot work on a (rows, columns) matrix, or None if it can."""
        for block_size in self.block_sizes:
            if columns % block_size:
                return f"block_size={block_size} does not divide its {columns} columns"
        return None

    def refresh(self, matrix: Tensor, seed: int) -> None:  # noqa: B027
        """Fit the state to a weight matrix (rows, columns), starting from the old state if any."""

    @abstractmethod
    def distort(self, matrix: Tensor, chosen: BlockMask, rows: Tensor | None = None) -> None:
        """Apply phi to the blocks in J, in place.

        Args:
            matrix: a contiguous copy of the weight matrix (rows, columns), or of some of its rows.
            chosen: J over the blocks of ``matrix``.
            rows: which rows of the weight ``matrix`` holds, shape (n,); None for all in order.
        """

    def as_blocks(
        self, chosen: BlockMask, device: torch.device, rows: Tensor | None = None
    ) -> BlockMask:
        """Return J over the blocks of a matrix, or of some rows, from J over what was sampled."""
        return chosen

    def _state_on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the state on the weight's device: the model may have moved since the fit.

        Tensors that are trained stay the same parameters, which an optimizer may have.
        """
        state = self.state
        if any(tensor.device != device for tensor in state.values()):
            # Replicas of nn.DataParallel, each in a thread, may replace self.state at any time.
            self.state = state = {key: _moved(tensor, device) for key, tensor in state.items()}
        return state


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(device)
    gradient = tensor.grad
    tensor.data = tensor.data.to(device)  # as nn.Module.to does
    tensor.grad = None if gradient is None else gradient.to(device)
    return tensor


class BlockNoise(NoiseFunction):
    """A noise on blocks of several elements, which keeps their codes if it needs them.

    With ``block_selection="cluster"`` J consists of all blocks of randomly chosen clusters (table
    5). Every such noise then needs ``codes``, those of the last refresh.
    """

    needs_codes: ClassVar[bool] = False

    def __init__(self, name, config, block_size, n_centroids):
        super().__init__(name, config, block_size, n_centroids)
        self.quantizer: Any = ProductQuantizer(block_size=block_size, n_centroids=n_centroids)
        if config.block_selection == "cluster":
            self.n_clusters = n_centroids
        self.has_codes = self.needs_codes or self.n_clusters is not None
        if self.has_codes:
            self.refreshed = "codebooks"

    def check(self, rows, columns):
        reason = super().check(rows, columns)
        return reason or (self.quantizer.check(rows, columns) if self.has_codes else None)

    def refresh(self, matrix, seed):
        if self.has_codes:
            self.quantizer = self.quantizer.for_values(matrix)
            self.state = fit_or_follow(self.quantizer, matrix, self._state_on(matrix.device), seed)

    def divide_rows(self, quantizer: RowGroupQuantizer, lookups: Tensor | None) -> None:
        """Divide the rows of a table into groups with their own blocks; before the first refresh.

        ``lookups`` are those of each row. None leaves the state empty, for :meth:`check` alone.
        """
        self.quantizer, self.block_sizes = quantizer, quantizer.block_sizes
        self.block_size = quantizer.block_size  # blocks of J: each block of a group has some
        if lookups is not None:
            groups = quantizer.row_groups_of(lookups)
            self.state["row_groups"] = broadcast_from_rank_0(groups)

    def as_blocks(self, chosen, device, rows=None):
        if self.n_clusters is not None:
            codes = self._state_on(device)["codes"]
            return chosen.expand_clusters(codes if rows is None else codes[rows])
        if len(self.block_sizes) > 1:
            groups = self.quantizer.groups(self._state_on(device))
            groups = groups if rows is None else groups[rows]
            return chosen.join_blocks(groups, [n // self.block_size for n in self.block_sizes])
        return chosen


@NOISES.register("proxy")
class ProxyNoise(BlockNoise):
    """phi_proxy(v) = 0: cheap, and close to the noise of product quantization (section 4.2)."""

    zeroes = True

    def distort(self, matrix, chosen, rows=None):
        chosen.zero(to_blocks(matrix, self.block_size))


@NOISES.register("mean")
class MeanNoise(BlockNoise):
    """phi(v) = the mean block of the weight at the last refresh (section 4.2)."""

    refreshed = "codebooks"

    def refresh(self, matrix, seed):
        super().refresh(matrix, seed)
        self.state["mean"] = to_blocks(matrix, self.block_size).float().mean(dim=0)

    def distort(self, matrix, chosen, rows=None):
        blocks = to_blocks(matrix, self.block_size)
        mean = self._state_on(matrix.device)["mean"]

        def new_values(indices: Tensor | None) -> Tensor:
            return mean.expand(blocks.shape[0] if indices is None else indices.numel(), -1)

        chosen.replace(blocks, new_values)


@NOISES.register("pq")
class ProductNoise(BlockNoise):
    """phi_PQ(v) = the centroid of v (Eq. 9): exact product quantization of the blocks in J.

    Codes are those of the last refresh. At p = 1 with centroids that are not trained, where the
    forward reads nothing of the weight itself, blocks are encoded again in each forward, as QAT
    requires. In a composition "pq" belongs first, so that it sees the dense weight.

    With ``learn_codebooks`` the float state is a dict of parameters, and a refresh only encodes the
    weight again.
    """

    needs_codes = True

    def __init__(self, name, config, block_size, n_centroids):
        super().__init__(name, config, block_size, n_centroids)
        settings = config.pq_settings(block_size, n_centroids)
        self.quantizer = quantizer_from_dict(settings)
        self.learns = config.learn_codebooks
        self._counts: tuple[Tensor, Tensor] | None = None  # codes, and their block counts

    def refresh(self, matrix, seed):
        if not (self.learns and "codes" in self.state):
            super().refresh(matrix, seed)
            if self.learns:
                trained = self.state.keys() - self.quantizer.not_trained - {"codes"}
                self.state |= {key: nn.Parameter(self.state[key]) for key in trained}
        else:
            state = self._state_on(matrix.device)
            state["codes"] = self.quantizer.encode(matrix, state)

    def decode(self, device: torch.device, rows: Tensor | None) -> Tensor:
        """Return the quantized matrix, or some of its rows, on the device of the weight.

        It is differentiable in the state. As in packed layers (section 3.2), a centroid gets the
        sum over its blocks divided by |J_c|, the number of all its blocks.
        """
        state = self._state_on(device)
        codes = state["codes"] if rows is None else state["codes"][rows]
        state = self.quantizer.averaging(state, self._block_counts)
        if rows is not None:
            state = self.quantizer.state_of_rows(state, rows)
        return self.quantizer.decode(codes, state)

    @torch.no_grad()
    def _block_counts(self) -> Tensor:
        codes = self.state["codes"]
        if self._counts is None or self._counts[0] is not codes:
            self._counts = codes, self.quantizer.block_counts(codes, self.state)
        return self._counts[1]

    def distort(self, matrix, chosen, rows=None):
        state = self._state_on(matrix.device)
        if chosen.is_full:
            if rows is not None:
                state = self.quantizer.state_of_rows(state, rows)
            matrix.copy_(self.quantizer.quantize(matrix, state))
        elif chosen.indices is not None and self._decodes_blocks:
            codes = state["codes"] if rows is None else state["codes"][rows]
            codes = codes.reshape(-1).index_select(0, chosen.indices)[:, None]
            new = self.quantizer.decode(codes, state)
            chosen.replace(to_blocks(matrix, self.block_size), lambda _: new)
        else:
            self.replace(matrix, chosen, self.decode(matrix.device, rows))

    @property
    def _decodes_blocks(self) -> bool:
        """Whether a block can be decoded without its row."""
        return type(self.quantizer) is ProductQuantizer and not self.quantizer.row_scale

    def replace(self, matrix: Tensor, chosen: BlockMask, decoded: Tensor) -> None:
        """Replace the blocks of a matrix in J by those of the decoded matrix, in place."""
        new = to_blocks(decoded, self.block_size)
        chosen.replace(
            to_blocks(matrix, self.block_size),
            lambda indices: new if indices is None else new.index_select(0, indices),
        )


@NOISES.register(*(f"int{bits}" for bits in range(1, 9)))
class FixedPointNoise(NoiseFunction):
    """phi_intN(w) = (round(w / s + z) - z) * s (Eq. 2), with s and z of the last refresh."""

    reads_block_size = False
    refreshed = "scales"

    def __init__(self, name, config, block_size, n_centroids):
        super().__init__(name, config, block_size, n_centroids)
        bits = int(name.removeprefix("int"))
        self.quantizer = FixedPointQuantizer(bits=bits, observer=config.observer)

    def refresh(self, matrix, seed):
        running = (self.state["low"], self.state["high"]) if self.state else None
        fitted, (low, high) = self.quantizer.fit_running(matrix, running)
        self.state = {**fitted, "low": low, "high": high}

    def distort(self, matrix, chosen, rows=None):
        quantizer, all_tensors = self.quantizer, self._state_on(matrix.device)
        state = {key: all_tensors[key] for key in quantizer.state_spec(*matrix.shape)}
        weights = to_blocks(matrix, 1)

        def new_values(indices: Tensor | None) -> Tensor:
            if indices is None:
                row_state = state if rows is None else quantizer.state_of_rows(state, rows)
                return quantizer.quantize(matrix, row_state).view(-1, 1)
            selected = matrix.view(-1).index_select(0, indices)  # 1-D: four times as fast
            if state["scale"].dim() == 0:
                return quantizer.quantize(selected, state)
            row_of_each = indices // matrix.shape[1]
            row_of_each = row_of_each if rows is None else rows[row_of_each]
            own = {key: each.view(-1).index_select(0, row_of_each) for key, each in state.items()}
            return quantizer.quantize(selected, own)

        chosen.replace(weights, new_values)
