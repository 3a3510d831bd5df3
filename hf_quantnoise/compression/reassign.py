"""Blocks change their codewords while centroids are finetuned, where a measurement says so.

Finetuning moves centroids; which block holds which stays as k-means left it. As in PV-tuning, a
gradient tells which few exchanges of a codeword would pay (``exchanges.py``). What it promises need
not come true: codewords lie far apart, moves that pay one by one need not pay together, and other
batches may not keep what some have promised. So a window of optimizer steps gathers the gradient,
its end proposes exchanges, and the first batch of the next step, which that gradient has not seen,
decides by its loss whether all of them are made, a part of the most promising ones, or none.

The window costs a float32 tensor of the size of each packed weight while a stage trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy, has_length
from transformers.utils import logging

from ..configuration import IPQConfig, QuantizedModelConfig
from ..distributed import sum_over_ranks
from ..modeling import PackedLayer, packed_layers
from ..quantizers import ProductQuantizer
from .arguments import CompressionArguments
from .exchanges import Exchanges, promising

logger = logging.get_logger(__name__)

# Parts of what is proposed that are tried one after the other, the most promising of it.
PARTS = (1, 1 / 4, 1 / 16, 1 / 64)


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


class ReassignCallback(TrainerCallback):
    """Gathers gradients, proposes exchanges of codewords, and has them checked by the trainer.

    A checkpoint forgets a window and what it proposed, so that nothing is carried over it, and a
    run that resumes goes on as if it had never stopped. An epoch forgets them as well: its batches
    hold examples that the window has seen. The last ``steps`` steps of a training are left to the
    centroids.

    Args:
        steps: optimizer steps of a window.
        share: share of all packed blocks that a window proposes to move, at most.

    Attributes:
        checks: optimizer steps done -> how many blocks were proposed then, and how many moved.

    Raises:
        ValueError: when training begins under FSDP, DeepSpeed or ``torch_compile``: codes that lie
            in parts on several devices, or are constants of a graph, cannot be changed in place.
    """

    def __init__(self, steps: int, share: float) -> None:
        self.steps, self.share = steps, share
        self.checks: dict[int, tuple[int, int]] = {}
        self._blocks, self._logged = 1, 0
        # Of each weight the layers that hold it, and the sum of its gradients.
        self._window: list[tuple[list[PackedLayer], Tensor]] = []
        self._gathered = 0
        self._proposal: Exchanges | None = None

    @property
    def waits(self) -> bool:
        """Whether exchanges wait for their check."""
        return self._proposal is not None

    def forget(self) -> None:
        """Leaves a window, and what was proposed and not yet checked."""
        self._listen(False)
        self._window, self._gathered, self._proposal = [], 0, None

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        _require_codes_in_place(self.steps, args)
        self._warn_of_short_windows(args, state, train_dataloader)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.forget()

    def on_save(self, args, state, control, **kwargs):
        self.forget()

    def on_train_end(self, args, state, control, **kwargs):
        self.forget()

    def on_step_begin(self, args, state, control, model: nn.Module, **kwargs):
        if not self._window and state.global_step + 2 * self.steps <= state.max_steps:
            self._window = self._weights_of(model)
        self._listen(True)

    def on_step_end(self, args, state, control, **kwargs):
        self._listen(False)
        if not self._window:
            return
        self._gathered += 1
        if self._gathered == self.steps:
            weights = [(layers, sum_over_ranks(total)) for layers, total in self._window]
            self._window, self._gathered = [], 0
            self._proposal = promising(weights, self.share)

    @torch.no_grad()
    def check(self, step: int, loss: Callable[[], Tensor]) -> None:
        """Makes all of the proposed exchanges, or the most promising part of them that is the
        first to lower a loss, or none.

        Args:
            step: optimizer steps done.
            loss: measures the loss of the model as it is, on this rank's batch, which is none that
                the window has seen; a scalar. Its sum over the ranks decides.
        """
        proposal, self._proposal = self._proposal, None
        moved = 0
        if len(proposal):
            before = _measured(loss)
            for count in dict.fromkeys(max(1, int(part * len(proposal))) for part in PARTS):
                had = proposal.put(proposal.codes[:count])
                if _measured(loss) < before:
                    moved = count
                    break
                proposal.put(had)
        self.checks[step], self._blocks = (len(proposal), moved), proposal.blocks

    def figures(self) -> dict[str, float]:
        """Shares of all packed blocks since this was last asked: ``reassign_proposed`` of those
        whose exchange was checked, ``reassigned`` of those that moved."""
        new = list(self.checks.values())[self._logged :]
        self._logged = len(self.checks)
        proposed, moved = (sum(pair[place] for pair in new) for place in (0, 1))
        return {
            "reassign_proposed": proposed / self._blocks,
            "reassigned": moved / self._blocks,
        }

    def _weights_of(self, model: nn.Module) -> list[tuple[list[PackedLayer], Tensor]]:
        weights: dict[int, tuple[list[PackedLayer], Tensor]] = {}
        for _, layer in packed_layers(model):
            if not isinstance(layer.quantizer, ProductQuantizer):
                continue
            indices = layer.weight_indices
            if hasattr(indices, "full_tensor"):  # a DTensor, FSDP by environment
                raise ValueError(_refusal(self.steps, "sharded parameters"))
            if id(indices) not in weights:
                total = torch.zeros(layer.rows, layer.columns, device=indices.device)
                weights[id(indices)] = [], total
            weights[id(indices)][0].append(layer)
        return list(weights.values())

    def _listen(self, on: bool) -> None:
        """Lets the layers hand on the gradients of their decoded weights, or no longer."""
        for layers, total in self._window:
            for layer in layers:
                layer.__dict__.pop("_on_gradient", None)
                if on:
                    layer.__dict__["_on_gradient"] = partial(_add, total)

    def _warn_of_short_windows(
        self, args: TrainingArguments, state: TrainerState, batches: object
    ) -> None:
        room = {
            f"the stage's {state.max_steps} steps, of which as many at the end are left to the "
            "centroids": state.max_steps // 2
        }
        if args.save_strategy == SaveStrategy.STEPS:
            name = f"the {state.save_steps} steps between checkpoints (save_steps)"
            room[name] = state.save_steps - 1
        if has_length(batches):
            epoch = math.ceil(len(batches) / args.gradient_accumulation_steps)
            room[f"the {epoch} steps of an epoch"] = epoch - 1
        least = min(room, key=room.get)
        if self.steps > room[least]:
            logger.warning(
                f"reassign_steps={self.steps}: no block will change its codeword in this stage, "
                f"for a window of so many steps and its check do not fit into {least}; one of at "
                f"most {room[least]} does"
            )


def _measured(loss: Callable[[], Tensor]) -> float:
    return float(sum_over_ranks(loss().detach().float().mean()))


def _add(total: Tensor, rows: Tensor | slice | None, gradient: Tensor) -> None:
    """Adds the gradient of some rows of a decoded matrix."""
    if isinstance(rows, Tensor):
        total.index_add_(0, rows, gradient.float())
    else:
        total[slice(None) if rows is None else rows] += gradient
