"""Batches in which some tokens are replaced at random, for a student that learns from a teacher."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_quantnoise.compression.distillation.random_tokens import with_random_tokens


class RandomTokens:
    """Collates examples; in some of them tokens are replaced by tokens of the batch.

    Args:
        collate: returns a batch with ``input_ids``.
        tokenizer: knows the special tokens.
        examples: share of the examples that are changed.
    """

    def __init__(
        self,
        collate: Callable[[list[dict]], dict[str, Tensor]],
        tokenizer: PreTrainedTokenizerBase,
        examples: float = 0.5,
    ) -> None:
        self.collate, self.tokenizer, self.examples = collate, tokenizer, examples

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        return with_random_tokens(self.collate(rows), self.tokenizer, self.examples)
