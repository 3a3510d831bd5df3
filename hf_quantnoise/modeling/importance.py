"""Importance of weights, measured on a layer's inputs: k-means weighted by activations.

The error that quantization causes in a layer's output is, over the rows x of its inputs X,

    ||X (W - W_q)^T||^2 = sum over inputs j, k of (X^T X)_jk <W - W_q, W - W_q>_jk.

Only the diagonal is used: h_j = sum of x_j^2 weighs the squared error of column j. For a
convolution, X are the unfolded patches and j is an input channel and a position in the kernel. The
inputs of a table are one-hot words: X^T X is exactly diagonal, and h counts each row's lookups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..argument_checks import run_batch
from ..blocks import matrix_shape
from ..distributed import broadcast_from_rank_0, on_any_rank, sum_over_ranks
from ..layer_types import known_layer_type
from .activations import evaluating, first_input, never_ran
from .padding import PaddingMasks

# Features that are zero on the calibration batches may be non-zero later: this share of the mean is
# added to every column's h.
DAMPING = 0.01


class _InputStatistics(TorchFunctionMode):
    """Sums the squares of what multiplies the weights of some layers, while a model runs.

    Layers are observed with a forward pre-hook, :meth:`observe`. Lookups are observed in
    ``F.embedding``, by the table they read: a subclass may be called with something other than row
    indices (OPT's positions). Padding does not count.
    """

    def __init__(self, layers: Sequence[nn.Module], padding: PaddingMasks) -> None:
        super().__init__()
        self.padding = padding
        # By id of the weight, float64: the sums of squares of its inputs, and the lookups of each
        # row of a table. All ranks have the same tensors, whatever their batches reach.
        self.columns: dict[int, Tensor] = {}
        self.rows: dict[int, Tensor] = {}
        self.ran: set[int] = set()  # the weights whose ``columns`` have inputs
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
        self.columns[key] += layer_type.input_energy(layer, inputs).double()
        self.ran.add(key)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.embedding and len(args) > 1 and id(args[1]) in self.rows:
            counts = self.rows[id(args[1])]
            words = self.padding.without_padding(args[0]).reshape(-1)
            counts += torch.bincount(words, minlength=len(counts))
        return func(*args, **(kwargs or {}))

    def sum_over_ranks(self) -> None:
        """Add the statistics of all ranks, which have the same layers."""
        for total in (*self.columns.values(), *self.rows.values()):
            sum_over_ranks(total)
        ran = on_any_rank([key in self.ran for key in self.columns])
        self.ran = {key for key, has_run in zip(self.columns, ran, strict=True) if has_run}


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
    padding = PaddingMasks(model)
    all_layers = [layer for layers in weights for layer in layers]
    statistics = _InputStatistics(all_layers, padding)
    with evaluating(model), padding, statistics, ExitStack() as hooks:
        for layer in all_layers:
            if known_layer_type(layer).input_energy is not None:
                hook = layer.register_forward_pre_hook(statistics.observe, with_kwargs=True)
                hooks.enter_context(hook)
        for batch in batches:
            padding.begin(batch)
            forward(batch)
    statistics.sum_over_ranks()
    return [_importance(model, layers, statistics) for layers in weights]


def _importance(
    model: nn.Module, layers: Sequence[nn.Module], statistics: _InputStatistics
) -> Tensor:
    key, parts = id(layers[0].weight), []
    if (rows := statistics.rows.get(key)) is not None and rows.any():
        parts.append(rows[:, None] + 1)
    if key in statistics.ran:
        columns = statistics.columns[key]
        mean = columns.mean()
        # If all inputs are zero, all weights count alike.
        parts.append(columns + DAMPING * mean if mean > 0 else torch.ones_like(columns))
    if not parts:
        raise never_ran("importance", model, layers[0])
    total = sum(part / part.mean() for part in parts)
    # Sums may be rounded differently on other ranks; k-means needs the same bits.
    return broadcast_from_rank_0((total / len(parts)).float())
