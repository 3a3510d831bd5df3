"""What a layer's inputs say about its weights: k-means weighted by activations.

The error that quantization leaves in a layer's output is, over the rows x of its inputs,

    ||X (W - W_q)^T||^2 = sum over inputs j, k of (X^T X)_jk <W - W_q, W - W_q>_jk,

of which only the diagonal is kept: h_j = sum of x_j^2 weighs the squared error of column j. For a
convolution j is an input channel and a place of the kernel, so that X are its unfolded patches. A
table's inputs are one-hot words: X^T X is exactly diagonal, and h is how often each row was
looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ..blocks import layout_of, weight_matrix
from ..distributed import broadcast_from_rank_0, on_any_rank, sum_over_ranks
from .activations import evaluating, never_ran
from .padding import PaddingMasks

# Inputs that were silent on a few batches are not silent for ever: a share of the mean is added to
# every column's h.
DAMPING = 0.01


def _linear_moments(layer: nn.Module, inputs: Tensor) -> Tensor:
    """(1, columns): sum of squares of each input."""
    return inputs.float().reshape(-1, inputs.shape[-1]).square().sum(0)[None]


def _conv_moments(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Sum of squares of what each number of a kernel is multiplied with: (1, columns), or (rows,
    columns) for a grouped convolution. As ``F.unfold`` would give it, without its memory."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    squares = F.pad(inputs.float(), layer._reversed_padding_repeated_twice, mode=mode).square()
    places = []
    for row in range(layer.kernel_size[0]):
        for column in range(layer.kernel_size[1]):
            window = squares
            for axis, place in ((2, row), (3, column)):
                reach = layer.dilation[axis - 2] * (layer.kernel_size[axis - 2] - 1)
                steps = (squares.shape[axis] - reach - 1) // layer.stride[axis - 2] + 1
                start = place * layer.dilation[axis - 2]
                kept = torch.arange(steps, device=squares.device) * layer.stride[axis - 2] + start
                window = window.index_select(axis, kept)
            places.append(window.sum((0, 2, 3)))
    by_group = torch.stack(places, 1).reshape(layer.groups, -1)
    if layer.groups == 1:
        return by_group
    return by_group.repeat_interleave(layer.out_channels // layer.groups, 0)


# How a layer's inputs weigh its columns; tables are watched by _Watch itself.
MOMENTS: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]] = {
    nn.Linear: _linear_moments,
    Conv1D: _linear_moments,
    nn.Conv2d: _conv_moments,
}


def _moments_shape(layer: nn.Module) -> tuple[int, int]:
    """What :data:`MOMENTS` give: a grouped convolution has inputs of its own for each row."""
    rows, columns = weight_matrix(layer).shape
    return (rows if getattr(layer, "groups", 1) > 1 else 1), columns


def _zeros(layer: nn.Module, *shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=layer.weight.device)


class _Watch(TorchFunctionMode):
    """Sums up what multiplies the weights of some layers while a model runs.

    Layers are watched by forward hooks. Lookups are watched where they happen, by the table that
    they read: a subclass may be called with something else than row numbers (OPT's positions).

    Attributes:
        columns: for each weight, by id, the sum of squares of its inputs; float64.
        ran: ids of the weights whose ``columns`` have seen any.
        rows: for each table, by id, how often each row was looked up; float64.
        padding: of the running batch, which counts for nothing.
    """

    def __init__(self, layers: Sequence[nn.Module], padding: PaddingMasks) -> None:
        super().__init__()
        self.layers, self.padding = layers, padding
        # All at once: every rank has the same tensors then, whatever its batches reach.
        self.columns = {
            id(layer.weight): _zeros(layer, *_moments_shape(layer))
            for layer in layers
            if layout_of(layer).base in MOMENTS
        }
        self.ran: set[int] = set()
        self.rows = {
            id(layer.weight): _zeros(layer, len(layer.weight))
            for layer in layers
            if isinstance(layer, nn.Embedding)
        }
        self._hooks: list = []

    def __enter__(self):
        for layer in self.layers:
            moments = MOMENTS.get(layout_of(layer).base)
            if moments is not None:
                hook = self._hook(moments)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def _hook(self, moments: Callable[[nn.Module, Tensor], Tensor]):
        def observe(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if inputs.dim() == 3:  # (batch, hidden) has no positions, whatever the mask's shape
                inputs = self.padding.without_padding(inputs)
            self.columns[id(layer.weight)] += moments(layer, inputs).double()
            self.ran.add(id(layer.weight))

        return observe

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.embedding and len(args) > 1 and id(args[1]) in self.rows:
            counts = self.rows[id(args[1])]
            words = self.padding.without_padding(args[0]).reshape(-1)
            counts += torch.bincount(words, minlength=len(counts))
        return func(*args, **(kwargs or {}))

    def sum_over_ranks(self) -> None:
        """Takes what the other ranks have seen into account. On all ranks, with the same layers."""
        for total in (*self.columns.values(), *self.rows.values()):
            sum_over_ranks(total)
        ran = on_any_rank([key in self.ran for key in self.columns])
        self.ran = {key for key, used in zip(self.columns, ran, strict=True) if used}


@torch.no_grad()
def measure_importance(
    model: nn.Module,
    weights: Sequence[Sequence[nn.Module]],
    batches: Sequence,
    forward: Callable[[object], object] | None = None,
) -> list[Tensor]:
    """How much the squared error of each number of some weights counts for their layers' outputs.

    A column's h is damped by :data:`DAMPING` of the mean; each row of a table has one lookup more
    than was seen (Laplace), so that the words of a few batches do not take the whole codebook.
    A weight with several layers sums over them; where it is a table and a head as well, both
    kinds are brought to mean 1 and added.

    Args:
        model: the model that holds the layers; put in eval mode meanwhile.
        weights: for each weight, the layers that hold it.
        batches: keyword arguments of the model's forward, a dict each; what their masks leave out
            counts for nothing.
        forward: runs one batch; None takes ``model(**batch)``.

    Returns:
        For each weight a float32 tensor of mean 1 that broadcasts to its matrix (rows, columns):
        (1, columns), (rows, 1) for a table, (rows, columns) for a grouped convolution and for a
        table that is a head too. In a distributed run, where each rank has batches of its own,
        over those of all ranks.

    Raises:
        ValueError: if a weight was never used on the batches (of any rank).
    """
    forward = forward or (lambda batch: model(**batch))
    padding = PaddingMasks(model)
    watch = _Watch([layer for layers in weights for layer in layers], padding)
    with evaluating(model), padding, watch:
        for batch in batches:
            padding.begin(batch)
            forward(batch)
    watch.sum_over_ranks()
    return [_importance(model, layers, watch) for layers in weights]


def _importance(model: nn.Module, layers: Sequence[nn.Module], watch: _Watch) -> Tensor:
    key, parts = id(layers[0].weight), []
    if (rows := watch.rows.get(key)) is not None and rows.any():
        parts.append(rows[:, None] + 1)
    if key in watch.ran:
        columns = watch.columns[key]
        mean = columns.mean()
        # A layer whose inputs are all zero has no preference.
        parts.append(columns + DAMPING * mean if mean > 0 else torch.ones_like(columns))
    if not parts:
        raise never_ran("importance", model, layers[0])
    total = sum(part / part.mean() for part in parts)
    # To the last bit: sums may be rounded otherwise elsewhere.
    return broadcast_from_rank_0((total / len(parts)).float())
