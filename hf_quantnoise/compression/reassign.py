"""Blocks change their codewords while centroids are finetuned, a few at a time (as in PV-tuning).

Finetuning moves centroids; which block holds which stays as k-means left it. Every n optimizer
steps, with g the gradient of the step's loss by a decoded block b, another codeword c in its place
changes the loss by

    <g, c - b> + k/2 ||c - b||^2,    k: the curvature, unknown,

which is a fall where k is below twice -<g, c - b> / ||c - b||^2. The moves of the largest such
ratio are those that pay at the largest k, so they are made: one code of a row at most, since the
blocks of a row mend the same error of the same output, and a small share of all blocks of the
model. (A larger share, or the blocks of the largest gradient, spoil a model: codewords lie far
apart, and most moves cost more than the slope promises.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from ..configuration import IPQConfig, QuantizedModelConfig
from ..distributed import of_rank_0, sum_over_ranks
from ..modeling import PackedLayer, packed_layers, set_codes
from ..quantizers import ProductQuantizer
from ..quantizers.kmeans import chunk_rows
from .arguments import CompressionArguments

_EXACT = "donot_use_mm_for_euclid_dist"


def require_centroids(
    config: QuantizedModelConfig, arguments: CompressionArguments, args: TrainingArguments
) -> None:
    """Raises ValueError where blocks are to be reassigned, and a config has no codewords or the
    training arguments do not let codes be changed."""
    steps = arguments.reassign_steps
    if steps is None:
        return
    if not isinstance(config, IPQConfig):
        raise ValueError(
            f"reassign_steps={steps} needs codewords, and a {type(config).__name__} has none; take "
            "an IPQConfig, or reassign_steps=None"
        )
    _require_codes_in_place(steps, args)


def _require_codes_in_place(steps: int, args: TrainingArguments) -> None:
    for name in ("fsdp", "deepspeed", "torch_compile"):
        if getattr(args, name, None):
            raise ValueError(_refusal(steps, name))


def _refusal(steps: int, name: str) -> str:
    return (
        f"reassign_steps={steps} does not go with {name} yet: codes are changed in place, on every "
        "rank alike; leave one of the two out"
    )


def _best_of_rows(layer: PackedLayer, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the one exchange of a code with the largest ratio; see the module's docstring.

    Returns:
        (ratios, places in the row of codes, new codes), each of shape (rows,).
    """
    quantizer, m = layer.quantizer, layer.quantizer.codes_per_block
    state = {key: value.detach() for key, value in layer.state.items()}
    books = quantizer.centroids(state).float().view(m, quantizer.n_centroids, -1)
    # Exact, so that a codeword's distance to itself and to its equals is 0.
    apart = torch.stack([torch.cdist(book, book, compute_mode=_EXACT).square() for book in books])
    slopes = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
    if quantizer.row_scale:
        scales = quantizer.scales(state).float()
        slopes = slopes * scales
    codes_of_rows = layer.codes().unflatten(1, (-1, m))  # (rows, blocks, m)
    found = []
    step = max(1, chunk_rows(quantizer.n_centroids) // layer.codes_per_row)
    for start in range(0, layer.rows, step):
        rows = slice(start, start + step)
        codes = codes_of_rows[rows].long()
        blocks = slopes[rows].unflatten(1, (-1, quantizer.block_size))
        along = torch.einsum("rbs,mks->rbmk", blocks, books)
        falls = along.gather(3, codes[..., None]) - along
        squares = apart[torch.arange(m, device=codes.device), codes]
        ratios = torch.where(squares > 0, falls / squares, 0.0).flatten(1)
        best, places = ratios.max(1)
        found.append((best, places // quantizer.n_centroids, places % quantizer.n_centroids))
    ratios, places, new = map(torch.cat, zip(*found, strict=True))
    if quantizer.row_scale:
        ratios = ratios / scales[:, 0].square().clamp_min(torch.finfo(torch.float32).tiny)
    return ratios, places, new


@torch.no_grad()
def reassign(weights: Sequence[tuple[list[PackedLayer], Tensor]], share: float) -> int:
    """Moves blocks to other codewords, in place; see the module's docstring.

    Args:
        weights: for each weight the packed layers that hold it, and the gradient of the loss by
            the decoded matrix, shape (rows, columns), float32.
        share: of all blocks of these weights at most this share is moved, rounded up.

    Returns:
        How many blocks moved.
    """
    exchanges = [_best_of_rows(layers[0], gradient) for layers, gradient in weights]
    ratios = torch.cat([ratios.cpu() for ratios, _, _ in exchanges])
    blocks = sum(gradient.numel() / layers[0].quantizer.block_size for layers, gradient in weights)
    chosen = torch.zeros_like(ratios, dtype=torch.bool)
    chosen[ratios.topk(min(math.ceil(share * blocks), len(ratios))).indices] = True
    chosen &= ratios > 0
    own = chosen.split([len(ratios) for ratios, _, _ in exchanges])
    for (layers, _), (_, places, new), rows in zip(weights, exchanges, own, strict=True):
        rows = rows.to(places.device)
        codes = layers[0].codes().clone()
        codes[rows, places[rows]] = new[rows].to(codes.dtype)
        set_codes(layers, of_rank_0(codes))
    return int(chosen.sum())


class ReassignCallback(TrainerCallback):
    """Reassigns blocks every few optimizer steps.

    The gradient is that of the very step (of all its micro-batches and all ranks), so that nothing
    is carried from step to step, and a run that resumes from a checkpoint goes on as if it had
    never stopped. The last ``steps`` steps of a training are left to the centroids.

    Args:
        steps: optimizer steps from one reassignment to the next.
        share: share of all blocks that may move in each.

    Attributes:
        moved: step -> number of blocks that moved.

    Raises:
        ValueError: when training begins under FSDP, DeepSpeed or ``torch_compile``: codes that lie
            in parts on several devices, or are constants of a graph, cannot be changed in place.
    """

    def __init__(self, steps: int, share: float) -> None:
        self.steps, self.share = steps, share
        self.moved: dict[int, int] = {}
        self._weights: dict[int, tuple[list[PackedLayer], Tensor]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        _require_codes_in_place(self.steps, args)

    def on_step_begin(self, args, state, control, model: nn.Module, **kwargs):
        step = state.global_step + 1
        if step % self.steps or step + self.steps > state.max_steps:
            return
        for _, layer in packed_layers(model):
            if not isinstance(layer.quantizer, ProductQuantizer):
                continue
            if hasattr(layer.weight_indices, "full_tensor"):  # a DTensor, FSDP by environment
                raise ValueError(_refusal(self.steps, "sharded parameters"))
            key = id(layer.weight_indices)
            if key not in self._weights:
                shape, device = (layer.rows, layer.columns), layer.weight_indices.device
                self._weights[key] = [], torch.zeros(shape, device=device)
            layers, total = self._weights[key]
            layers.append(layer)
            layer.__dict__["_on_gradient"] = partial(_add, total)

    def on_step_end(self, args, state, control, **kwargs):
        if not self._weights:
            return
        for layers, _ in self._weights.values():
            for layer in layers:
                layer.__dict__.pop("_on_gradient", None)
        weights = [(layers, sum_over_ranks(total)) for layers, total in self._weights.values()]
        self.moved[state.global_step] = reassign(weights, self.share)
        self._weights = {}


def _add(total: Tensor, rows: Tensor | slice | None, gradient: Tensor) -> None:
    """Adds the gradient of some rows of a decoded matrix."""
    if isinstance(rows, Tensor):
        total.index_add_(0, rows, gradient.float())
    else:
        total[slice(None) if rows is None else rows] += gradient
