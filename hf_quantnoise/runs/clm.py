"""Finetune a causal language model with quantization noise, compress it and load it again.

Text is tokenized as one stream and split into examples of equal length. The closing table has the
perplexity per token of the model's tokenizer. ``results.json`` also has the perplexity per word,
as reported for WikiText in the literature (words are separated by white space, and each end of line
counts as a word).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForCausalLM, default_data_collator

from ..configuration.flags import parse_int_or_dict
from ..configuration.options import option
from .arguments import Arguments
from .example import Example
from .example_data import (
    READERS,
    SplitArguments,
    check_column,
    check_minimum,
    check_text,
    read_table,
    require_filled,
)
from .job import Job
from .known_flags import TEXT_ELSEWHERE
from .tokenizers import position_limit

# Larger ones are lengths of sequences: that is what transformers' run_clm.py calls a block.
MAX_BLOCK_SIZE = 32


@dataclass
class TextArguments(SplitArguments):
    """Data to train and evaluate on."""

    file_kind: ClassVar[str] = f"a UTF-8 text file, or a {', '.join(READERS)} file"
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    elsewhere: ClassVar[Mapping[str, str]] = TEXT_ELSEWHERE
    needs_predictions: ClassVar[bool] = False

    dataset_config_name: str | None = option(None, "Configuration of the dataset on the Hub.")
    text_column: str = option(
        "text", "Text column of the dataset on the Hub, or of a parquet, csv or json file."
    )
    sequence_length: int = option(512, "Tokens per example.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum(self, 2, "sequence_length")

    def check_quantization(self, flags: Any) -> None:
        """Refuse a ``--block_size`` that looks like the one of other scripts."""
        size = parse_int_or_dict("block_size", flags.block_size)
        if isinstance(size, int) and size > MAX_BLOCK_SIZE:
            raise ValueError(
                f"invalid --block_size {size}: it is the number of weights per quantization block, "
                f"expected at most {MAX_BLOCK_SIZE} for this task; use --sequence_length {size} "
                "for the number of tokens per example"
            )


@dataclass(frozen=True)
class TokenizedText:
    """Examples of equal length, with the counts of tokens and words for perplexities."""

    rows: Dataset
    tokens: int  # those that are predicted
    words: float  # that these tokens make up, including ends of lines


def read_text(
    args: TextArguments, split: str, cache_dir: str | None, token: str | None = None
) -> list[str]:
    """Return the lines of a split, from a file or from the Hub."""
    if (path := args.file(split)) is None:
        rows = args.load_from_hub(split, cache_dir, token, args.dataset_config_name)
        return _lines_of(rows, args.text_column, str(args.dataset_name))
    if os.path.splitext(path)[1].lower() in READERS:
        rows = read_table(f"{split}_file", path, cache_dir)
        return _lines_of(rows, args.text_column, f"--{split}_file {path!r}")
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"invalid --{split}_file {path!r}: expected a UTF-8 text file ({error})"
        ) from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"invalid --{split}_file {path!r}: the file has no text")
    return lines


def _lines_of(rows: Dataset, column: str, source: str) -> list[str]:
    """Return the texts of a table, each with the end of a line."""
    check_column("text_column", column, rows, source)
    check_text("text_column", column, rows, source)
    require_filled(rows, [column], source)
    return [line if line.endswith("\n") else f"{line}\n" for line in rows[column]]


def split_into_examples(
    lines: list[str], tokenizer, length: int, limit: int | None, flag: str
) -> TokenizedText:
    """Tokenize lines as one stream and split it into examples of ``length`` tokens.

    The remainder is dropped. ``limit`` is the maximum number of examples, or None; errors name
    the ``flag`` of the text.
    """
    encoded = tokenizer(lines, add_special_tokens=False, return_attention_mask=False)
    stream = [token for line in encoded["input_ids"] for token in line]
    count = len(stream) // length
    if count == 0:
        raise ValueError(
            f"invalid {flag}: {len(stream)} tokens are less than --sequence_length {length}; pass "
            "more text or a smaller length"
        )
    words = sum(len(line.split()) + line.count("\n") for line in lines)
    count = min(count, limit or count)
    predicted = count * (length - 1)  # the first token of an example is not predicted
    examples = [stream[i * length : (i + 1) * length] for i in range(count)]
    rows = Dataset.from_dict({"input_ids": examples, "labels": examples})
    return TokenizedText(rows, tokens=predicted, words=words * predicted / len(stream))


def perplexities(scores: dict[str, float], text: TokenizedText) -> dict[str, float]:
    """Return the perplexity per token, and per word of the text."""
    loss = scores["loss"]
    return {"perplexity": _exp(loss), "word_perplexity": _exp(loss * text.tokens / text.words)}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def prepare(args: Arguments) -> Job:
    """Load text, tokenizer and model."""
    data, model_args = args.data, args.model
    config, tokenizer = model_args.load_config(), model_args.load_tokenizer()
    model = model_args.load_model(data.auto_class, config)
    limit = position_limit(model)
    if limit is not None and data.sequence_length > limit:
        raise ValueError(
            f"invalid --sequence_length {data.sequence_length}: expected at most the model's "
            f"{limit} positions"
        )

    def read(split: str) -> TokenizedText:
        lines = read_text(data, split, model_args.cache_dir, model_args.token)
        length, limit = data.sequence_length, data.limit(split)
        return split_into_examples(lines, tokenizer, length, limit, f"--{split}_file")

    texts = {split: read(split) for split in args.splits}
    rows = {split: text.rows for split, text in texts.items()}
    args.training.prediction_loss_only = True  # the logits of all texts would fill the memory
    return Job(
        model=model,
        parts={
            "train_dataset": rows.get("train"),
            "eval_dataset": rows.get("validation"),
            "processing_class": tokenizer,
            "data_collator": default_data_collator,
        },
        metric="perplexity",
        task="text-generation",
        **data.evaluated_dataset(),
        add_scores=lambda scores: perplexities(scores, texts["validation"]),
    )


example = Example(
    TextArguments,
    "Finetune a causal language model with quantization noise and compress it.",
    prepare,
)
parse, run, main, script = example.parse, example.run, example.main, example.script
