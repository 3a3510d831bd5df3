"""Bit allocation: choose how each weight is stored so that the file meets a target size.

The size is that of the safetensors file, header included, counted to the byte by packing a copy of
the model with empty tensors. Layers are pruned and shared first (section 7.9); the budget is spent
on the remaining weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...argument_checks import read_batches, require_instance, require_weights
from ...blocks import weight_matrix
from ...configuration import IPQConfig, QuantizedModelConfig
from ...distributed import broadcast_object, is_rank_0, on_any_rank, raise_on_all_ranks
from ...lookups import Lookups, count_lookups, with_number_of_rows
from ...modeling.packable import check_can_be_packed
from ...modeling.structural_changes import changed_copy
from ...noise import find_state
from ...quantizers.base import require_finite
from ...size import aligned
from .candidates import WeightCandidates, candidates_for
from .knapsack import Option, allocate_bytes
from .sensitivity import costs_by_output
from .size_target import (
    check_target_reachable,
    check_within_target,
    file_bytes,
    require_within_target,
    weights_to_store,
)

# The bytes of a candidate are an estimate (the digits of offsets in the header vary). After each
# round the file is counted and the remaining bytes are allocated again.
ROUNDS = 6


@dataclass(frozen=True)
class AllocatedWeight:
    """One weight of a bit allocation.

    Attributes:
        name: name of the first layer that holds the weight.
        group: structure group.
        layers: number of layers that hold it.
        stored: how it is stored, e.g. ``"pq 256x8"``.
        bytes: size of its tensors in the file, with an estimate of their header entries.
        cost: divergence of the output; without data the relative error times the number of weights.
        settings: its entry of ``layer_quantizers``.
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
    """How each weight is stored to meet a target size. ``str()`` gives a table.

    Attributes:
        weights: the weights of all stages, in the order of the model.
        file_bytes: size of the saved ``model.safetensors``.
        target_bytes: the target.
    """

    weights: list[AllocatedWeight]
    file_bytes: int
    target_bytes: int

    @property
    def layer_quantizers(self) -> dict[str, dict[str, Any]]:
        """Layer name -> settings, for :class:`IPQConfig`."""
        return {weight.name: dict(weight.settings) for weight in self.weights}

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("weight", "group", "stored", "kB", "cost")]
        for weight in self.weights:
            others = f" (+{weight.layers - 1})" if weight.layers > 1 else ""
            size, cost = f"{weight.bytes / 1e3:,.1f}", f"{weight.cost:.3g}"
            lines.append((weight.name + others, weight.group, weight.stored, size, cost))
        total = f"{self.file_bytes / 1e6:.3f} MB of {self.target_bytes / 1e6:.3f} MB"
        return f"{aligned(lines, left=3)}\ntotal file size: {total}"


def plan_bit_allocation(
    model: PreTrainedModel,
    config: IPQConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    progress: bool = True,
    lookups: Lookups | None = None,
) -> BitAllocation:
    """Choose how each weight is stored so that the saved file meets the config's target.

    Args:
        model: a dense model without noise; it is not changed.
        config: with ``target_size_mb`` or ``target_bits_per_weight``. Its stages, targets and
            exclusions select the weights; ``codebook_bits`` and ``kmeans_iter`` apply to all of
            them; ``block_size`` and ``n_centroids`` are not read.
        batches: a few batches to measure sensitivities on, each the keyword arguments of a forward.
            None: quantization errors decide. In a distributed run each rank passes its own batches,
            and all of them count.
        progress: show progress bars.
        lookups: :func:`count_lookups` of the training data, if ``config.frequent_rows`` is set;
            None counts the batches.

    Raises:
        TypeError: if the config is not an :class:`IPQConfig`, or another argument something else.
        ValueError: if it has no target or does not fit the model, or if the target cannot be
            reached or needs no quantization.
    """
    check_can_be_packed(model)
    require_instance("config", config, IPQConfig, "an IPQConfig", "set a target size in it")
    require_weights(model)
    with raise_on_all_ranks():
        batches = read_batches("batches", batches)
    if config.target is None:
        raise ValueError(
            "invalid config: it has no target; set target_size_mb or target_bits_per_weight"
        )
    if find_state(model) is not None:
        raise ValueError("the model has quantization noise; call remove_quant_noise(model) first")
    config, lookups = _with_lookups(model, config, batches, lookups)
    target = check_target_reachable(model, config)
    copy = changed_copy(model, config).eval()
    groups = weights_to_store(copy, config)
    for layers in groups:
        require_finite(weight_matrix(layers[0].module), f"{layers[0].name}.weight")
    bar = tqdm(groups, "quantization errors", unit="weight", disable=not progress, leave=False)
    weights = [
        candidates_for(layers, config, lookups=lookups.get(layers[0].name)) for layers in bar
    ]
    options = _options(weights, copy, batches, target, progress)
    chosen = broadcast_object(_choose(model, config, weights, options, target))
    rows = []
    for weight, choices, index in zip(weights, options, chosen, strict=True):
        candidate, layer, cost = weight.candidates[index], weight.layer, choices[index].cost
        stored = candidate.short_name, candidate.bytes, cost, candidate.settings
        rows.append(AllocatedWeight(layer.name, layer.group, len(weight.layers), *stored))
    size = file_bytes(model, _with_choices(config, weights, chosen))
    require_within_target(copy, config, target, size, sum(row.bytes for row in rows))
    return BitAllocation(rows, size, target)


def _with_lookups(
    model: PreTrainedModel,
    config: IPQConfig,
    batches: Sequence[Mapping[str, Any]],
    lookups: Lookups | None,
) -> tuple[IPQConfig, Lookups]:
    """Return the config with a number of frequent rows, and the lookups if it needs them."""
    if not config.counts_lookups:
        return config, {}
    lookups = count_lookups(model, batches) if lookups is None else lookups
    return with_number_of_rows(config, lookups), lookups


def _options(
    weights: Sequence[WeightCandidates],
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    target: int,
    progress: bool,
) -> list[list[Option]]:
    """Return the bytes and the cost of every candidate.

    Without batches, the cost is ||W - W_q||^2 / ||W||^2 times the number of weights.
    """
    if on_any_rank([bool(batches)])[0]:
        bits = 8 * target / sum(p.numel() for p in model.parameters())
        costs = costs_by_output(weights, model, batches, bits, progress)
    else:
        costs = [[c.error * weight.layer.numel for c in weight.candidates] for weight in weights]
    return [
        [Option(each.bytes, cost) for each, cost in zip(weight.candidates, row, strict=True)]
        for weight, row in zip(weights, costs, strict=True)
    ]


def _choose(
    model: PreTrainedModel,
    config: IPQConfig,
    weights: Sequence[WeightCandidates],
    options: list[list[Option]],
    target: int,
) -> list[int]:
    """Return the cheapest choice found whose file is within the target."""

    def total(chosen: list[int]) -> Option:
        picked = [choices[index] for choices, index in zip(options, chosen, strict=True)]
        return Option(sum(each.bytes for each in picked), sum(each.cost for each in picked))

    def left(chosen: list[int]) -> int:
        return target - file_bytes(model, _with_choices(config, weights, chosen))

    best = [choices.index(min(choices)) for choices in options]  # the fewest bytes
    budget = left(best) + total(best).bytes
    previous: list[int] = []
    for _ in range(ROUNDS):
        chosen = allocate_bytes(options, budget)
        if chosen == previous:
            break
        previous, size = chosen, total(chosen).bytes
        if not any(chosen):  # all dense, which is larger than the target
            budget = size - 1
            continue
        remaining = left(chosen)
        if remaining >= 0 and total(chosen).cost <= total(best).cost:
            best = chosen
        budget = size + remaining
    return best


def _with_choices(
    config: IPQConfig, weights: Sequence[WeightCandidates], chosen: list[int]
) -> IPQConfig:
    """Return the config with one candidate, given by its index, for each weight."""
    settings = {
        weight.layer.name: weight.candidates[index].settings
        for weight, index in zip(weights, chosen, strict=True)
    }
    return replace(config, layer_quantizers=settings)


def allocate_bits(
    model: PreTrainedModel,
    config: IPQConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    progress: bool = True,
    table: bool | None = None,
    lookups: Lookups | None = None,
) -> IPQConfig:
    """Return a copy of the config with ``layer_quantizers`` that meet its target size.

    It can be saved, edited and passed to ``quantize_model`` or ``QuantNoiseTrainer.compress``.

    Args:
        model: a dense model without noise; it is not changed.
        config: with ``target_size_mb`` or ``target_bits_per_weight``.
        batches: a few batches to measure sensitivities on, each the keyword arguments of a forward.
            None: quantization errors decide. In a distributed run each rank passes its own batches.
        progress: show progress bars.
        table: print the allocation as a table; None prints it if ``progress`` is set.
        lookups: :func:`count_lookups` of the training data, if ``config.frequent_rows`` is set.
            None: those of the batches.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the config has no target or does not fit the model, or the target cannot be
            reached or needs no quantization.
    """
    allocation = plan_bit_allocation(model, config, batches, progress, lookups)
    if (progress if table is None else table) and is_rank_0():
        tqdm.write(str(allocation))
    return replace(config, layer_quantizers=allocation.layer_quantizers)


def allot(*args: Any, **kwargs: Any) -> IPQConfig:
    """Deprecated alias of :func:`allocate_bits`."""
    name = allot.__name__
    warnings.warn(
        f"{name} is deprecated and will be removed in version 0.2.0; use allocate_bits instead",
        FutureWarning,
        stacklevel=2,
    )
    return allocate_bits(*args, **kwargs)


def resolve_target(
    model: PreTrainedModel,
    config: QuantizedModelConfig,
    batches: Iterable[Mapping[str, Any]] | None = None,
    progress: bool = True,
    table: bool | None = None,
    lookups: Lookups | None = None,
) -> QuantizedModelConfig:
    """Return a config whose saved file is within its target.

    Bits are allocated if the config has a target and no ``layer_quantizers``. Without a target the
    config is returned unchanged and the batches are not read.
    """
    if config.target is None or not isinstance(config, IPQConfig):
        return config
    if not config.settings_by_name():
        return allocate_bits(model, config, list(batches or []), progress, table, lookups)
    check_can_be_packed(model)
    check_within_target(model, config)
    return config
