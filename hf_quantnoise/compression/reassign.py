"""Blocks change their codewords while centroids are finetuned, a few at a time (as in PV-tuning).

Finetuning moves centroids; which block holds which stays as k-means left it. Every n optimizer
steps, with g the gradient of the step's loss by a decoded block b, the block steps to

    b' = b - r g / ||g||,   r: mean distance from a centroid to the nearest other,

and takes the codeword c nearest to b'. As b itself stands r away from b', any other c obeys
||c - b'|| <= r, and so <g, c - b> <= -||g|| ||c - b||^2 / (2 r) < 0: the linearised loss falls. A
smaller r would hardly ever reach another codeword, and a larger one leaves the reach of g.

Only the block of the largest gradient of a row moves, in the rows where it is largest, and no more
than a share of all blocks: the blocks of a row mend the same error of the same output, and moved
together they would overshoot.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from ..configuration import IPQConfig, QuantizedModelConfig
from ..distributed import of_rank_0, sum_over_ranks
from ..modeling import PackedLayer, packed_layers, set_codes
from ..quantizers import ProductQuantizer
from .arguments import CompressionArguments


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


@torch.no_grad()
def reassign(layers: list[PackedLayer], gradient: Tensor, share: float) -> int:
    """Moves blocks of one weight to other codewords, in place; see the module's docstring.

    Args:
        layers: the packed layers that hold the weight.
        gradient: of the loss by the decoded matrix, shape (rows, columns), float32.
        share: at most this share of the weight's blocks is moved.

    Returns:
        How many blocks moved.
    """
    layer = layers[0]
    quantizer = layer.quantizer
    blocks = gradient.view(layer.rows, -1, quantizer.block_size)
    norms = torch.nan_to_num(blocks.norm(dim=2), nan=0.0, posinf=0.0)
    largest, places = norms.max(1)
    count = min(int(share * norms.numel()), int((largest > 0).sum()))
    if not count:
        return 0
    rows = largest.topk(count).indices
    places, lengths = places[rows], largest[rows][:, None]
    slopes = blocks[rows, places]
    state = quantizer.state_of_rows({k: v.detach() for k, v in layer.state.items()}, rows)
    codes = layer.codes().clone().view(layer.rows, -1, quantizer.codes_per_block)
    old = codes[rows, places]
    here = quantizer.decode(old, state).float()
    target = here - quantizer.spacing(state) * slopes / lengths
    new = quantizer.encode(target, state).to(codes.dtype)
    there = quantizer.decode(new, state).float()
    falls = ((there - here) * slopes).sum(1, keepdim=True) < 0  # a beam search may miss the nearest
    codes[rows, places] = torch.where(falls, new, old)
    set_codes(layers, of_rank_0(codes.view(layer.rows, -1)))
    return int((falls & (new != old)).any(1).sum())


class ReassignCallback(TrainerCallback):
    """Reassigns blocks every few optimizer steps.

    The gradient is that of the very step (of all its micro-batches and all ranks), so that nothing
    is carried from step to step, and a run that resumes from a checkpoint goes on as if it had
    never stopped. The last ``steps`` steps of a training are left to the centroids.

    Args:
        steps: optimizer steps from one reassignment to the next.
        share: share of a weight's blocks that may move in each.

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
        moved = 0
        for layers, total in self._weights.values():
            for layer in layers:
                layer.__dict__.pop("_on_gradient", None)
            moved += reassign(layers, sum_over_ranks(total), self.share)
        self.moved[state.global_step] = moved
        self._weights = {}


def _add(total: Tensor, rows: Tensor | slice | None, gradient: Tensor) -> None:
    """Adds the gradient of some rows of a decoded matrix."""
    if isinstance(rows, Tensor):
        total.index_add_(0, rows, gradient.float())
    else:
        total[slice(None) if rows is None else rows] += gradient
