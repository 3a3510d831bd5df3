"""The noise functions phi of section 4: what becomes of a block that is in J.

``"pq"`` and ``"intN"`` are the package's quantizers applied to some blocks only, so noise and
storage cannot disagree. A new noise is a subclass of :class:`NoiseFunction` with a decorator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import to_blocks
from ..configuration import NOISES, QuantNoiseConfig
from ..quantizers import FixedPointQuantizer, ProductQuantizer
from .block_mask import BlockMask


class NoiseFunction(ABC):
    """phi for one weight (tied layers share it).

    Args:
        name: the name it is registered under.
        config: the whole noise config.
        block_size: numbers per block for this weight.
        n_centroids: size of its codebook, for noises that have one.

    Attributes:
        reads_block_size: False where the noise works on single weights.
        by_cluster: whether J consists of whole clusters (``block_selection="cluster"``).
        refreshed: which refresh keeps its state current: ``"codebooks"``, ``"scales"`` or None.
        state: fitted tensors. They are no buffers: nothing of them enters the model's state_dict.
    """

    reads_block_size: ClassVar[bool] = True
    by_cluster: bool = False
    refreshed: str | None = None

    def __init__(
        self, name: str, config: QuantNoiseConfig, block_size: int, n_centroids: int
    ) -> None:
        self.name = name
        self.block_size = block_size if self.reads_block_size else 1
        self.state: dict[str, Tensor] = {}

    def check(self, rows: int, columns: int) -> str | None:
        """None if the noise can work on a (rows, columns) matrix, else the reason why not."""
        if columns % self.block_size:
            return f"block_size={self.block_size} does not divide its {columns} columns"
        return None

    def refresh(self, matrix: Tensor, seed: int) -> None:
        """Fits the state to a weight matrix (rows, columns), from the old state where it helps."""
        return None

    def n_choices(self, n_blocks: int) -> int:
        """What J is drawn from: the blocks, or the clusters they belong to."""
        return self.quantizer.n_centroids if self.by_cluster else n_blocks

    @abstractmethod
    def distort(self, matrix: Tensor, selection: BlockMask, rows: Tensor | None = None) -> None:
        """Applies phi to the blocks in J, in place.

        Args:
            matrix: a contiguous copy of the weight matrix (rows, columns), or of some of its rows.
            selection: J over the blocks of ``matrix``.
            rows: which rows of the weight ``matrix`` holds, shape (n,); None for all in order.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The fitted tensors."""
        return dict(self.state)

    def check_state(self, tensors: dict[str, Tensor]) -> None:
        """Refuses tensors that are not those of this noise and weight.

        Raises:
            ValueError: naming what differs.
        """
        if tensors.keys() != self.state.keys():
            raise ValueError(
                f"the state of {self.name!r} noise is {sorted(self.state)}, not {sorted(tensors)}"
            )
        for key, tensor in tensors.items():
            own = tuple(self.state[key].shape)
            if tuple(tensor.shape) != own:
                raise ValueError(
                    f"{key} of {self.name!r} noise has shape {own}, not {tuple(tensor.shape)}"
                )

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave; see :meth:`check_state`."""
        self.check_state(tensors)
        self.state = {
            key: tensor.detach().to(self.state[key], copy=True) for key, tensor in tensors.items()
        }

    def _state_on(self, device: torch.device) -> dict[str, Tensor]:
        """The state where the weight now lives: a model may be moved after the noise was fitted."""
        if any(tensor.device != device for tensor in self.state.values()):
            self.state = {key: tensor.to(device) for key, tensor in self.state.items()}
        return self.state


class BlockNoise(NoiseFunction):
    """A noise on blocks of several numbers, which knows their clusters where it needs them.

    With ``block_selection="cluster"`` J consists of the blocks of randomly chosen clusters (table
    5), so that every such noise needs an assignment: ``codes``, those of the last refresh.
    """

    needs_codes: ClassVar[bool] = False

    def __init__(
        self, name: str, config: QuantNoiseConfig, block_size: int, n_centroids: int
    ) -> None:
        super().__init__(name, config, block_size, n_centroids)
        self.quantizer = ProductQuantizer(block_size=block_size, n_centroids=n_centroids)
        self.by_cluster = config.block_selection == "cluster"
        self.has_codes = self.needs_codes or self.by_cluster
        if self.has_codes:
            self.refreshed = "codebooks"

    def check(self, rows: int, columns: int) -> str | None:
        reason = super().check(rows, columns)
        return reason or (self.quantizer.check(rows, columns) if self.has_codes else None)

    def refresh(self, matrix: Tensor, seed: int) -> None:
        if self.has_codes:
            old = {"codebook": self.state["codebook"]} if self.state else None
            fitted = self.quantizer.fit(matrix, seed=seed, init=old)
            self.state = {**fitted, "codes": self.quantizer.encode(matrix, fitted)}


@NOISES.register("proxy")
class ProxyNoise(BlockNoise):
    """phi_proxy(v) = 0: cheap, and close to the noise of product quantization (section 4.2)."""

    def distort(self, matrix: Tensor, selection: BlockMask, rows: Tensor | None = None) -> None:
        selection.zero(to_blocks(matrix, self.block_size))


@NOISES.register("mean")
class MeanNoise(BlockNoise):
    """phi(v) = the mean block of the weight at the last refresh (section 4.2)."""

    refreshed = "codebooks"

    def refresh(self, matrix: Tensor, seed: int) -> None:
        super().refresh(matrix, seed)
        self.state["mean"] = to_blocks(matrix, self.block_size).float().mean(dim=0)

    def distort(self, matrix: Tensor, selection: BlockMask, rows: Tensor | None = None) -> None:
        blocks = to_blocks(matrix, self.block_size)
        mean = self._state_on(matrix.device)["mean"]

        def values(indices: Tensor | None) -> Tensor:
            return mean.expand(blocks.shape[0] if indices is None else indices.numel(), -1)

        selection.replace(blocks, values)


@NOISES.register("pq")
class ProductNoise(BlockNoise):
    """phi_PQ(v) = the centroid of v (Eq. 9): exact product quantization of the blocks in J.

    Assignments are those of the last refresh: a block in J becomes ``codebook[codes]``. At p = 1,
    where nothing of the weight itself would be left to move them, blocks are assigned anew in each
    forward, which is QAT proper. In a composition "pq" belongs first: it looks at the clean weight.
    """

    needs_codes = True

    def distort(self, matrix: Tensor, selection: BlockMask, rows: Tensor | None = None) -> None:
        state = self._state_on(matrix.device)
        if selection.everything:
            matrix.copy_(self.quantizer.quantize(matrix, state))
            return
        codes = state["codes"] if rows is None else state["codes"][rows]

        def values(indices: Tensor | None) -> Tensor:
            if indices is None:
                return self.quantizer.decode(codes, state).view(-1, self.block_size)
            return self.quantizer.decode(codes.reshape(-1, 1).index_select(0, indices), state)

        selection.replace(to_blocks(matrix, self.block_size), values)


@NOISES.register(*(f"int{bits}" for bits in range(1, 9)))
class FixedPointNoise(NoiseFunction):
    """phi_intN(w) = (round(w / s + z) - z) * s (Eq. 2), with s and z of the last refresh."""

    reads_block_size = False
    refreshed = "scales"

    def __init__(
        self, name: str, config: QuantNoiseConfig, block_size: int, n_centroids: int
    ) -> None:
        super().__init__(name, config, block_size, n_centroids)
        bits = int(name.removeprefix("int"))
        self.quantizer = FixedPointQuantizer(bits=bits, observer=config.observer)

    def check(self, rows: int, columns: int) -> str | None:
        return self.quantizer.check(rows, columns)

    def refresh(self, matrix: Tensor, seed: int) -> None:
        running = (self.state["low"], self.state["high"]) if self.state else None
        fitted, (low, high) = self.quantizer.fit_running(matrix, running)
        self.state = {**fitted, "low": low, "high": high}

    def distort(self, matrix: Tensor, selection: BlockMask, rows: Tensor | None = None) -> None:
        on_device = self._state_on(matrix.device)
        state = {key: on_device[key] for key in self.quantizer.state_spec(*matrix.shape)}
        per_row = state["scale"].dim() > 0
        numbers = to_blocks(matrix, 1)

        def values(indices: Tensor | None) -> Tensor:
            if indices is None:
                own = state if rows is None else self.quantizer.state_of_rows(state, rows)
                return self.quantizer.quantize(matrix, own).view(-1, 1)
            chosen = numbers.index_select(0, indices)
            if not per_row:
                return self.quantizer.quantize(chosen, state)
            owner = indices // matrix.shape[1]
            owner = owner if rows is None else rows[owner]
            return self.quantizer.quantize(chosen, self.quantizer.state_of_rows(state, owner))

        selection.replace(numbers, values)
