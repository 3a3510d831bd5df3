"""A size on disk, met weight by weight: sensitivities, the allotment, and the table that shows it.

What is counted is the safetensors file to the byte, header included, by packing a copy of the model
that has shapes and no numbers. Layers are taken out and shared first (7.9); the budget is for what
is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer

from ...configuration import DENSE, IPQConfig, QuantizedModelConfig
from ...distributed import broadcast_object, is_rank_0, on_any_rank
from ...modeling.packer import check_can_be_packed
from ...modeling.structural_changes import changed_copy
from ...noise import find_state
from .candidates import WeightChoices, choices_for
from .knapsack import Option, allocate_bytes, smallest
from .sensitivity import costs_by_error, costs_by_output
from .size_target import (
    check_target_can_be_met,
    check_within_target,
    file_bytes,
    weights_to_store,
    with_choices,
)

# Bytes that candidates leave open (digits of offsets in the header) are found by counting; so many
# times is the rest spent again.
ROUNDS = 6


@dataclass(frozen=True)
class AllocatedWeight:
    """One weight of an allotment.

    Attributes:
        name: of the first layer that holds it.
        group: structure group.
        layers: number of layers that hold it.
        stored: how, e.g. ``"pq 256x8"``.
        bytes: its tensors in the file, and about their share of its header.
        cost: divergence of the output, or without data the relative error times the weights.
        settings: the entry of ``layer_quantizers``.
    """

    name: str
    group: str
    layers: int
    stored: str
    bytes: int
    cost: float
    settings: dict[str, Any]


@dataclass(frozen=True)
class BitAllocation:
    """How a target is met. ``str()`` gives the table.

    Attributes:
        weights: of all stages, in the order of the model.
        file_bytes: size of the saved ``model.safetensors``.
        target_bytes: what was asked for.
    """

    weights: list[AllocatedWeight]
    file_bytes: int
    target_bytes: int

    @property
    def layer_quantizers(self) -> dict[str, dict[str, Any]]:
        """Layer name -> settings, for :class:`IPQConfig`."""
        return {weight.name: dict(weight.settings) for weight in self.weights}

    def __str__(self) -> str:
        lines = [("weight", "group", "stored", "kB", "cost")]
        for weight in self.weights:
            more = f" (+{weight.layers - 1})" if weight.layers > 1 else ""
            size, cost = f"{weight.bytes / 1e3:,.1f}", f"{weight.cost:.3g}"
            lines.append((weight.name + more, weight.group, weight.stored, size, cost))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = (
            "  ".join(
                cell.ljust(width) if place < 3 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        total = f"{self.file_bytes / 1e6:.3f} MB of {self.target_bytes / 1e6:.3f} MB"
        return "\n".join([*rows, f"the whole file: {total}"])


def plan_bit_allocation(
    model: PreTrainedModel,
    config: IPQConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> BitAllocation:
    """Finds how each weight is to be stored so that the saved file meets the config's target.

    Args:
        model: a dense model without noise; left as it is.
        config: with ``target_size_mb`` or ``target_bits_per_weight``. Its stages, targets and
            exclusions say which weights are quantized, ``codebook_bits`` and ``kmeans_iter`` how;
            ``block_size`` and ``n_centroids`` are not read.
        batches: a few batches, each the keyword arguments of a forward, to measure sensitivities
            on; None (or none) goes by quantization errors alone. In a distributed run each rank
            gives its own, and those of all ranks count.
        progress: show bars.

    Raises:
        TypeError: if the config is no :class:`IPQConfig`.
        ValueError: if it has no target, the target cannot be reached or needs no quantization, or
            the config cannot be carried out.
    """
    if not isinstance(config, IPQConfig):
        raise TypeError(f"config is a {type(config).__name__}; a size is allotted by an IPQConfig")
    if config.target is None:
        raise ValueError("config has no target; set target_size_mb or target_bits_per_weight")
    check_can_be_packed(model)
    if find_state(model) is not None:
        raise ValueError("the model has quantization noise; call remove_quant_noise(model) first")
    target = check_target_can_be_met(model, config)
    copy = changed_copy(model, config).eval()
    members = weights_to_store(copy, config)
    weights = [
        choices_for(own, config)
        for own in tqdm(members, desc="quantization errors", unit="weight", disable=not progress)
    ]
    batches = list(batches or [])
    if on_any_rank([bool(batches)])[0]:
        bits = 8 * target / sum(p.numel() for p in copy.parameters())
        costs = costs_by_output(weights, copy, batches, bits, progress)
    else:
        costs = costs_by_error(weights)
    options = [
        [Option(own.bytes, cost) for own, cost in zip(choices.candidates, row, strict=True)]
        for choices, row in zip(weights, costs, strict=True)
    ]
    chosen = broadcast_object(_best_within(model, config, weights, options, target))
    return _allotment(model, config, weights, options, chosen, target)


def allocate_bits(
    model: PreTrainedModel,
    config: IPQConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    progress: bool = True,
    table: bool | None = None,
) -> IPQConfig:
    """The config with its target turned into ``layer_quantizers``, which can be saved, edited and
    given to ``quantize_model`` or ``QuantNoiseTrainer.compress``, of this run or another.

    Other arguments and errors are those of :func:`plan_bit_allocation`.

    Args:
        table: print them as a table; None does where ``progress`` does.
    """
    allotment = plan_bit_allocation(model, config, batches, progress)
    if (progress if table is None else table) and is_rank_0():
        tqdm.write(str(allotment))
    return replace(config, layer_quantizers=allotment.layer_quantizers)


def within_target(
    model: PreTrainedModel,
    config: QuantizedModelConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    progress: bool = True,
    table: bool | None = None,
) -> QuantizedModelConfig:
    """A config whose saved file is within its target: allotted where that was not done yet. One
    without a target comes back as it is, and the batches are not read.

    Raises:
        ValueError: as :func:`plan_bit_allocation`, or if ``layer_quantizers`` is over the target.
    """
    if config.target is None:
        return config
    if not config.settings_by_name():
        return allocate_bits(model, config, batches, progress, table)
    check_can_be_packed(model)
    check_within_target(model, config)
    return config


def _best_within(
    model: PreTrainedModel,
    config: IPQConfig,
    weights: Sequence[WeightChoices],
    options: Sequence[Sequence[Option]],
    target: int,
) -> list[int]:
    """The cheapest allotment found whose file, counted to the byte, is within the target."""
    best = [smallest(own) for own in options]

    def cost(places: Sequence[int]) -> float:
        return sum(own[place].cost for own, place in zip(options, places, strict=True))

    def taken(places: Sequence[int]) -> int:
        return sum(own[place].bytes for own, place in zip(options, places, strict=True))

    def packs_none(places: Sequence[int]) -> bool:
        pairs = zip(weights, places, strict=True)
        return all(own.candidates[place].settings["scheme"] == DENSE for own, place in pairs)

    budget = target - (file_bytes(model, with_choices(config, weights, best)) - taken(best))
    before: list[int] = []
    for _ in range(ROUNDS):
        places = allocate_bytes(options, budget)
        if places == before:
            break
        before = places
        if packs_none(places):
            budget = taken(places) - 1  # the dense model is larger than the target
            continue
        left = target - file_bytes(model, with_choices(config, weights, places))
        if left >= 0 and cost(places) <= cost(best):
            best = places
        budget = taken(places) + left
    return best


def _allotment(
    model: PreTrainedModel,
    config: IPQConfig,
    weights: Sequence[WeightChoices],
    options: Sequence[Sequence[Option]],
    chosen: Sequence[int],
    target: int,
) -> BitAllocation:
    rows = []
    for choices, own, place in zip(weights, options, chosen, strict=True):
        candidate = choices.candidates[place]
        rows.append(
            AllocatedWeight(
                name=choices.name,
                group=choices.members[0].group,
                layers=len(choices.members),
                stored=candidate.short_name,
                bytes=candidate.bytes,
                cost=own[place].cost,
                settings=candidate.settings,
            )
        )
    size = file_bytes(model, with_choices(config, weights, chosen))
    return BitAllocation(rows, size, target)


def first_batches(trainer: Trainer, count: int) -> Iterator[Mapping[str, Any]]:
    """The first training batches of a trainer, none where it has no training data. Nothing is read
    before the first is asked for."""
    if trainer.train_dataset is not None:
        for batch in islice(trainer.get_train_dataloader(), count):
            yield trainer._prepare_inputs(batch)
