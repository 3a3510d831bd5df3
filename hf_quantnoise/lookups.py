"""How often the rows of a vocabulary table are looked up in some batches.

The token ids of batches are counted; the model does not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .argument_checks import describe
from .configuration import QuantizedModelConfig, QuantNoiseConfig
from .distributed import on_any_rank, raise_on_all_ranks, sum_over_ranks
from .structure import find_layers, weights_of

Lookups = Mapping[str, Tensor]  # layer -> number of lookups of each row of its table, (rows,)
Config = TypeVar("Config", bound=QuantizedModelConfig | QuantNoiseConfig)


def count_lookups(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], progress: bool = False
) -> dict[str, Tensor]:
    """Return the number of lookups of each row, by the name of each layer that holds the table.

    The tables are those of ``get_input_embeddings`` of the model and its parts. Padding (attention
    mask 0) does not count. The decoder of an encoder-decoder model with a separate
    table looks up ``decoder_input_ids`` or, if a batch has none, the labels. In a distributed run
    all ranks must call it; the batches of all ranks count.

    Raises:
        ValueError: if the batches have no ids for a table.
    """
    tables = {
        members: torch.zeros(members[0].rows, dtype=torch.int64)
        for members in weights_of([layer for layer in find_layers(model) if layer.input_table])
    }
    ends = _ends(model)
    with raise_on_all_ranks():
        bar = tqdm(batches, "count lookups", unit="batch", disable=not progress, leave=False)
        for batch in bar:
            ids = _ids_of(batch)
            for members, counts in tables.items():
                for end in ends.get(id(members[0].module.weight), ("encoder",)):
                    found = ids.get(end, counts[:0])
                    found = found[(found >= 0) & (found < len(counts))]
                    counts += torch.bincount(found, minlength=len(counts))
    for members, counts in tables.items():
        if not on_any_rank([bool(counts.any())])[0]:
            raise ValueError(
                f"frequent_rows: the data has no lookups of {members[0].name} (expected input_ids "
                "in the batches); pass other batches, or set frequent_rows=None"
            )
        sum_over_ranks(counts)
    return {layer.name: counts for members, counts in tables.items() for layer in members}


def _ends(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return the ends of an encoder-decoder model that read each table, by the id of its weight."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    ends: dict[int, tuple[str, ...]] = {}
    for end, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        table = part.get_input_embeddings()
        if isinstance(table, nn.Embedding):
            ends[id(table.weight)] = (*ends.get(id(table.weight), ()), end)
    return ends


def _ids_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the ids that each end of a model looks up in a batch, one-dimensional."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"invalid batch: got {describe(batch)}, expected a dict of tensors")
    decoder = "decoder_input_ids" if "decoder_input_ids" in batch else "labels"
    names = {
        "encoder": ("input_ids", "attention_mask"),
        "decoder": (decoder, "decoder_attention_mask"),
    }
    found = {}
    for end, (ids, mask) in names.items():
        if isinstance(values := batch.get(ids), Tensor) and not values.is_floating_point():
            values, mask = values.cpu(), batch.get(mask)
            if isinstance(mask, Tensor) and mask.shape == values.shape:
                values = values[mask.cpu().bool()]
            found[end] = values.reshape(-1)
    return found


def with_number_of_rows(config: Config, lookups: Lookups) -> Config:
    """Return the config with a number in place of a share as ``frequent_rows``.

    With several tables it is the largest one, so that each serves at least the share.
    """
    share = getattr(config, "frequent_rows", None)
    if not isinstance(share, float):
        return config
    numbers = [1]
    for counts in lookups.values():
        served = torch.sort(counts, descending=True).values.cumsum(0)
        numbers.append(int((served < share * float(served[-1])).sum()) + 1)
    changes: Any = {"frequent_rows": max(numbers)}
    return replace(config, **changes)
