"""Lloyd steps that follow a weight after training has changed it, from its last codes.

A fit begins with a seeding and runs many iterations. These are not needed if the last codes are
known: the centroids become the means of the blocks with these codes, and the blocks are encoded
again, until few codes change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..blocks import to_blocks
from .product import ProductQuantizer
from .row_groups import RowGroupQuantizer
from .row_scale import as_divisor, refit_scale, row_weights

# The last step is one that changes fewer codes than this share. After an epoch of finetuning, the
# first to third step does. A further one improves the objective by about 0.2%.
SETTLED = 0.05


def fit_or_follow(
    quantizer: Any, matrix: Tensor, state: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return a state with ``codes``: fitted, or from the last one if ``state`` has codes."""
    state = dict(state)
    if (codes := state.pop("codes", None)) is not None:
        state, codes = follow(quantizer, matrix, codes, state, seed)
    else:
        state = quantizer.fit(matrix, seed=seed, init=state or None)
        codes = quantizer.encode(matrix, state)
    return {**state, "codes": codes}


@torch.no_grad()
def follow(
    quantizer: ProductQuantizer | RowGroupQuantizer,
    matrix: Tensor,
    codes: Tensor,
    state: dict[str, Tensor],
    seed: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return state and codes of a changed weight matrix (rows, columns).

    Args:
        quantizer: how it is stored.
        matrix: its current values.
        codes, state: of its earlier values.
        seed: seed of the restarts of centroids without blocks.
    """
    for _ in range(quantizer.n_iter):
        state = refit(quantizer, matrix, codes, state, seed)
        old_codes, codes = codes, quantizer.encode(matrix, state)
        if int((codes != old_codes).count_nonzero()) < SETTLED * codes.numel():
            break
    return state, codes


def refit(
    quantizer: Any, matrix: Tensor, codes: Tensor, state: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return the state of lowest error for given codes, half a Lloyd step (section 3.2)."""
    if isinstance(quantizer, RowGroupQuantizer):
        states, new = [], {key: tensor.clone() for key, tensor in state.items()}
        for part, rows, own_codes, own in quantizer.split(codes, state):
            own = part.state_of_rows(own, rows)
            states.append(refit(part, matrix[rows], own_codes, own, seed))
            if quantizer.row_scale:
                new["row_scale"][rows] = states[-1]["row_scale"]
        return {**new, **quantizer.join_states(states)}
    dtype, matrix, codes = matrix.dtype, matrix.float(), codes.long()
    rows, weights = matrix, None
    if quantizer.row_scale:
        scale = quantizer.scales(state).float()
        rows, weights = matrix / as_divisor(scale), row_weights(scale)
    codebook = quantizer.update_codebook(
        to_blocks(rows, quantizer.block_size),
        quantizer.block_weights(matrix, weights),
        codes.view(-1, quantizer.codes_per_block),
        state["codebook"].float(),
        torch.Generator().manual_seed(seed),
    )
    fitted: dict[str, Tensor] = quantizer.state_of(codebook.to(dtype))
    if quantizer.row_scale:
        decoded = quantizer.decode(codes, {**fitted, "row_scale": torch.ones_like(scale)})
        scale = refit_scale(matrix, matrix.new_ones(1, 1), decoded.float(), scale)
        fitted["row_scale"] = scale.to(dtype)
    return fitted
