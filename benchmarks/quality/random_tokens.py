"""Batches in which some tokens are replaced at random, for a student that learns from a teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class RandomTokens:
    """Collates examples; in some of them tokens are replaced by tokens of the batch.

    The teacher sees the same tokens, so no label is needed for the changed text. Special tokens and
    padding stay.

    Args:
        collate: returns a batch with ``input_ids``.
        tokenizer: knows the special tokens.
        examples: share of the examples that are changed.
        tokens: share of the tokens of such an example that are replaced.
    """

    def __init__(
        self,
        collate: Callable[[list[dict]], dict[str, Tensor]],
        tokenizer: PreTrainedTokenizerBase,
        examples: float = 0.5,
        tokens: float = 0.2,
    ) -> None:
        self.collate, self.examples, self.tokens = collate, examples, tokens
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)))

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = self.collate(rows)
        ids = batch["input_ids"]
        words = ~torch.isin(ids, self.special)
        changed = words & (torch.rand(ids.shape) < self.tokens) & (
            torch.rand(len(ids), 1) < self.examples
        )  # fmt: skip
        found = ids[words]
        ids[changed] = found[torch.randint(len(found), (int(changed.sum()),))]
        return batch
