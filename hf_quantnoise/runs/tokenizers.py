"""Tokenizers of the examples, and how many tokens a model takes."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from ..repository import missing_model

_WAY_OUT = "save the model's tokenizer to its folder, or pass --tokenizer_name to finetune"


def load_tokenizer(flag: str, name: str, **kwargs: Any) -> Any:
    """Load the tokenizer of the folder or repository that a flag names.

    Raises:
        ValueError: if there is none; transformers (5.23) loads an empty one for most models.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        reason = text if os.path.isdir(name) else missing_model(name, error)
        raise ValueError(
            f"invalid --{flag} {name!r}: its tokenizer cannot be loaded ({reason}); {_WAY_OUT}"
        ) from None
    if not _has_words(tokenizer):
        raise ValueError(
            f"invalid --{flag} {name!r}: its tokenizer has only special tokens, as if the "
            f"tokenizer's files are missing; {_WAY_OUT}"
        )
    return tokenizer


def _has_words(tokenizer: Any) -> bool:
    """Return whether there are tokens with letters or digits that are not special."""
    special = set(tokenizer.all_special_tokens)
    return any(
        token not in special and any(map(str.isalnum, token)) for token in tokenizer.get_vocab()
    )


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens of a model, or None.

    RoBERTa and its relatives start counting after the position of the padding token, so they take
    fewer tokens than ``max_position_embeddings``.
    """
    limits = [getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(module.num_embeddings - padding - 1)
    return min((limit for limit in limits if limit is not None), default=None)
