"""Importance of weights, measured on a layer's inputs: k-means weighted by activations.

The error that quantization causes in a layer's output is, over the rows x of its inputs X,

    ||X (W - W_q)^T||^2 = sum over inputs j, k of (X^T X)_jk <W - W_q, W - W_q>_jk.

Only the diagonal is used: h_j = sum of x_j^2 weighs the squared error of column j. For a
convolution, X are the unfolded patches and j is an input channel and a position in the kernel. The
inputs of a table are one-hot words: X^T X is exactly diagonal, and h counts each row's lookups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..argument_checks import FoundWhileRunning, run_batch
from ..blocks import matrix_shape
from ..distributed import broadcast_from_rank_0, on_any_rank, sum_over_ranks
from ..layer_types import known_layer_type
from ..module_modes import evaluating
from .activations import first_input, name_of, require_reached
from .padding import PaddingMasks

# Features that are zero on the calibration batches may be non-zero later: this share of the mean is
# added to every column's h.
DAMPING = 0.01


class _InputStatistics(TorchFunctionMode):
    """Sums the squares of what multiplies the weights of some layers, while a model runs.

    Layers are observed with a forward pre-hook, :meth:`observe`. Lookups are observed in
    ``F.embedding``, by the table they read: a subclass may be called with something other than row
    indices (OPT's positions). A table may also be read completely, without lookups (DeBERTa's
    relative positions). Padding does not count.
    """

    def __init__(self, layers: Sequence[nn.Module], padding: PaddingMasks) -> None:
        super().__init__()
        self.padding = padding
        # By id of the weight, float64: the sums of squares of its inputs, and the lookups of each
        # row of a table. All ranks have the same tensors, whatever their batches reach.
        self.columns: dict[int, Tensor] = {}
        self.rows: dict[int, Tensor] = {}
        self.ran: set[int] = set()  # the weights whose ``columns`` have inputs
        self.read: set[int] = set()  # the tables that some operation other than a lookup has read
        for layer in layers:
            layer_type, (rows, columns) = known_layer_type(layer), matrix_shape(layer)
            sizes = {"dtype": torch.float64, "device": layer.weight.device}
            if layer_type.input_energy is not None:
                own_inputs = getattr(layer, "groups", 1) > 1  # each row reads different inputs
                shape = (rows if own_inputs else 1, columns)
                self.columns[id(layer.weight)] = torch.zeros(shape, **sizes)
            if layer_type.is_table:
                self.rows[id(layer.weight)] = torch.zeros(rows, **sizes)

    def observe(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        layer_type, key = known_layer_type(layer), id(layer.weight)
        if (inputs := first_input(args, kwargs)) is None:
            return
        # (batch, features) has no positions, even if it has the shape of the mask.
        if inputs.dim() == 3 and layer_type.features_last:
            inputs = self.padding.without_padding(inputs)
        energy, total = layer_type.input_energy(layer, inputs), self.columns[key]
        if energy.shape != total.shape:
            raise FoundWhileRunning(
                f"invalid input_energy of the layer type {layer_type.layer_class.__name__}: got "
                f"shape {tuple(energy.shape)}, expected {tuple(total.shape)}; correct its record"
            )
        total += energy.double()
        self.ran.add(key)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.embedding and len(args) > 1 and id(args[1]) in self.rows:
            counts = self.rows[id(args[1])]
            words = self.padding.without_padding(args[0]).reshape(-1)
            counts += torch.bincount(words, minlength=len(counts))
        elif isinstance(result, Tensor):  # not the dtype or shape of a table
            for arg in (*args, *(kwargs or {}).values()):
                operands = arg if isinstance(arg, list | tuple) else (arg,)
                self.read.update(self.rows.keys() & set(map(id, operands)))
        return result

    def sum_over_ranks(self) -> None:
        """Add the statistics of all ranks, which have the same layers."""
        for total in (*self.columns.values(), *self.rows.values()):
            sum_over_ranks(total)
        for found, keys in ((self.ran, self.columns), (self.read, self.rows)):
            on_ranks = on_any_rank([key in found for key in keys])
            found.update(key for key, is_found in zip(keys, on_ranks, strict=True) if is_found)

    def of(self, key: int) -> list[Tensor]:
        """Return the sums for a weight that broadcast to its matrix: of columns, of rows, or both.

        A table that is only read without lookups counts each row once. The list is empty if the
        model has not used the weight.
        """
        parts = []
        if (rows := self.rows.get(key)) is not None and rows.any():
            parts.append(rows[:, None] + 1)
        if key in self.ran:
            columns = self.columns[key]
            mean = columns.mean()
            # If all inputs are zero, all weights count alike.
            parts.append(torch.ones_like(columns) if mean == 0 else columns + DAMPING * mean)
        if not parts and key in self.read:
            parts.append(torch.ones_like(rows[:, None]))
        return parts


@torch.no_grad()
def measure_importance(
    model: nn.Module,
    weights: Sequence[Sequence[nn.Module]],
    batches: Sequence,
    forward: Callable[[object], object] | None = None,
) -> list[Tensor]:
    """Return how much the squared error of each value of some weights counts for the outputs.

    A column's h is damped by :data:`DAMPING` of the mean. Each row of a table counts one lookup
    more than was seen (Laplace), so that the words of a few batches do not take the complete
    codebook. For a weight with several layers the sums are added; for a table that is also a head,
    both kinds are scaled to mean 1 and averaged.

    ``weights`` has, for each weight, the layers that hold it. The batches of all ranks count, their
    padding does not. ``forward`` runs one batch; None is ``model(**batch)``.

    Returns:
        For each weight a float32 tensor of mean 1 that broadcasts to its matrix (rows, columns):
        (1, columns), (rows, 1) for a table, (rows, columns) for a grouped convolution and for a
        table that is also a head.
    """
    forward = forward or (lambda batch: run_batch(model, batch))
    with _measuring(model, weights) as statistics:
        for batch in batches:
            statistics.padding.begin(batch)
            forward(batch)
    statistics.sum_over_ranks()
    parts = [statistics.of(id(layers[0].weight)) for layers in weights]
    layers = [members[0] for members in weights]
    require_reached("importance", model, layers, [bool(found) for found in parts])
    return [_importance(model, *each) for each in zip(layers, parts, strict=True)]


@torch.no_grad()
def require_measurable(
    model: nn.Module,
    weights: Sequence[Sequence[nn.Module]],
    batches: Sequence,
    forward: Callable[[object], object],
) -> None:
    """Run batches until each weight was used, as :func:`measure_importance` needs it.

    All ranks must call it. Raises ValueError, naming a layer that the batches of no rank reach.
    """
    keys = [id(layers[0].weight) for layers in weights]
    with _measuring(model, weights) as statistics:
        for batch in batches:
            if all(map(statistics.of, keys)):
                break
            statistics.padding.begin(batch)
            forward(batch)
    layers = [members[0] for members in weights]
    require_reached("importance", model, layers, [bool(statistics.of(key)) for key in keys])


@contextmanager
def _measuring(
    model: nn.Module, weights: Sequence[Sequence[nn.Module]]
) -> Iterator[_InputStatistics]:
    """Collect statistics of some weights inside the context, with the model in eval mode."""
    layers = [layer for members in weights for layer in members]
    statistics = _InputStatistics(layers, PaddingMasks(model))
    with evaluating(model), statistics.padding, statistics, ExitStack() as hooks:
        for layer in layers:
            if known_layer_type(layer).input_energy is not None:
                hook = layer.register_forward_pre_hook(statistics.observe, with_kwargs=True)
                hooks.enter_context(hook)
        yield statistics


def _importance(model: nn.Module, layer: nn.Module, parts: list[Tensor]) -> Tensor:
    """Return the mean of the sums for one weight, each scaled to mean 1."""
    total = (sum(part / part.mean() for part in parts) / len(parts)).float()
    if not bool(torch.isfinite(total).all() and (total > 0).all()):
        raise ValueError(
            f"importance: the inputs of {name_of(model, layer)} on the calibration data are "
            "NaN, infinite or too large for float32 (their squares are summed); check the data and "
            'the output of the dense model, or set importance="none"'
        )
    # Sums may be rounded differently on other ranks; k-means needs the same bits.
    return broadcast_from_rank_0(total)
