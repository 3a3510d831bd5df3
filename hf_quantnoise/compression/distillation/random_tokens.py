"""Random tokens in the batches of a model that is distilled from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SHARE_OF_TOKENS = 0.2


def with_random_tokens(
    inputs: Mapping[str, Any], tokenizer: Any, examples: float, tokens: float = SHARE_OF_TOKENS
) -> dict[str, Any]:
    """Return a batch in which some tokens are replaced by others of the batch, drawn at random.

    The teacher sees the same text, so its outputs are the targets for it, and no label is needed.
    Special tokens and padding are kept.

    Args:
        inputs: the batch; is not changed.
        tokenizer: its special tokens are kept; or a processor that has a tokenizer.
        examples: share of the examples that are changed.
        tokens: share of the tokens of such an example that are replaced.

    Raises:
        ValueError: if the batch lacks ``input_ids``, or the tokenizer is missing.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"invalid random_tokens={examples!r}: the batch has {', '.join(inputs)}, expected "
            "input_ids; set random_tokens=0"
        )
    special = getattr(getattr(tokenizer, "tokenizer", tokenizer), "all_special_ids", None)
    if special is None:
        raise ValueError(
            f"invalid random_tokens={examples!r}: got a processing_class of type "
            f"{type(tokenizer).__name__}, expected a tokenizer, whose special tokens are kept; "
            "pass processing_class=tokenizer to the trainer, or set random_tokens=0"
        )
    device = ids.device
    words = ~torch.isin(ids, torch.tensor(sorted(set(special)), device=device))
    changed = words & (torch.rand(ids.shape, device=device) < tokens)
    changed &= torch.rand((len(ids), *[1] * (ids.dim() - 1)), device=device) < examples
    found = ids[words]
    if not len(found):
        return dict(inputs)
    drawn = torch.randint(len(found), (int(changed.sum()),), device=device)
    replaced = ids.clone()
    replaced[changed] = found[drawn]
    return {**inputs, "input_ids": replaced}
