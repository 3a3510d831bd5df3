"""Finetunes a causal language model with quantization noise, compresses it, loads it again.

Text is tokenized as one stream and cut into pieces of equal length. The closing table gives the
perplexity per token of the model's own tokenizer, and ``results.json`` the one per word too, which
the literature gives for WikiText (words are what white space separates, and each line's end).

The run itself is in ``compression_run.py``, the flags are in ``example_arguments.py``; they can
also be given as one JSON file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from .compression_run import Example, Job, finetunes_stages, require_train_data
from .example_arguments import Arguments
from .example_data import Split, SplitArguments


@dataclass
class TextArguments(SplitArguments):
    """What to train and evaluate on."""

    content: ClassVar[str] = "text"
    file_kind: ClassVar[str] = "a UTF-8 text file"

    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset on the Hub."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the Hub's dataset."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens per example."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 2:
            raise ValueError(f"--sequence_length {self.sequence_length} must be 2 or more")


@dataclass(frozen=True)
class Pieces:
    """Tokenized text.

    Attributes:
        rows: examples of equal length.
        tokens, words: number of predicted tokens, and of words (with line ends) they stand for.
    """

    rows: Dataset
    tokens: int
    words: float


def read_text(args: TextArguments, split: Split, cache_dir: str | None) -> list[str]:
    """The lines of a split, from a file or from the Hub.

    Raises:
        ValueError: naming the flag of a column that is missing or a file that is empty or no text.
    """
    if split.file is None:
        rows = load_dataset(
            args.dataset_name, args.dataset_config_name, split=split.name, cache_dir=cache_dir
        )
        if args.text_column not in rows.column_names:
            raise ValueError(
                f"--text_column {args.text_column!r} is not in {args.dataset_name}; it has "
                f"{', '.join(rows.column_names)}"
            )
        return [line if line.endswith("\n") else f"{line}\n" for line in rows[args.text_column]]
    try:
        with open(split.file, encoding="utf-8") as file:
            lines = file.readlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{split.flag} {split.file!r} is no text in UTF-8 ({error}); give a plain text file"
        ) from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"{split.flag} {split.file!r} holds no text")
    return lines


def cut(lines: list[str], tokenizer, length: int, limit: int | None, flag: str) -> Pieces:
    """Tokenizes lines as one stream and cuts it into examples.

    Args:
        lines: the text.
        tokenizer: the model's.
        length: tokens per example; what is left at the end is dropped.
        limit: most examples, or None.
        flag: where the text came from, for the error.

    Raises:
        ValueError: if the text is shorter than one example.
    """
    encoded = tokenizer(lines, add_special_tokens=False, return_attention_mask=False)
    stream = [token for line in encoded["input_ids"] for token in line]
    count = len(stream) // length
    if count == 0:
        raise ValueError(
            f"{flag} has {len(stream)} tokens, less than --sequence_length {length}; give more "
            "text or a smaller length"
        )
    words = sum(len(line.split()) + 1 for line in lines)
    count = min(count, limit or count)
    predicted = count * (length - 1)  # nothing stands before the first token of an example
    examples = [stream[i * length : (i + 1) * length] for i in range(count)]
    return Pieces(
        Dataset.from_dict({"input_ids": examples, "labels": examples}),
        tokens=predicted,
        words=words * predicted / len(stream),
    )


def perplexities(scores: dict[str, float], pieces: Pieces) -> dict[str, float]:
    """exp of the mean loss per token, and per word of the text."""
    loss = scores["loss"]
    return {
        "perplexity": _exp(loss),
        "word_perplexity": _exp(loss * pieces.tokens / pieces.words),
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def prepare(args: Arguments) -> Job:
    """Tokenized text, tokenizer and model."""
    data, model_args = args.data, args.model
    require_train_data(args, data.has_train_data)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path, **model_args.hub()
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path, dtype=model_args.dtype, **model_args.hub()
    )
    reach = getattr(model.config, "max_position_embeddings", None)
    if reach is not None and data.sequence_length > reach:
        raise ValueError(
            f"--sequence_length {data.sequence_length} is more than the model's {reach} positions"
        )

    def pieces(name: str) -> Pieces:
        split = data.split(name)
        lines = read_text(data, split, model_args.cache_dir)
        return cut(lines, tokenizer, data.sequence_length, split.limit, split.flag)

    train = validation = None
    if args.training.do_train or finetunes_stages(args):
        train = pieces("train")
    if args.training.do_eval:
        validation = pieces("validation")
    args.training.prediction_loss_only = True  # logits of whole texts would fill the memory
    return Job(
        model=model,
        parts={
            "train_dataset": train and train.rows,
            "eval_dataset": validation and validation.rows,
            "processing_class": tokenizer,
            "data_collator": default_data_collator,
        },
        auto_class=AutoModelForCausalLM,
        metric="perplexity",
        task="text-generation",
        dataset=data.dataset_name,
        add_scores=lambda scores: perplexities(scores, validation),
    )


example = Example(
    TextArguments,
    "Finetunes a causal language model with quantization noise and compresses it.",
    prepare,
)
parse, run, main = example.parse, example.run, example.main
