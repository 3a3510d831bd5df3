"""Text of other data sets, for a student whose teacher needs no label."""

from __future__ import annotations

import os
from itertools import pairwise

import glue
from datasets import Dataset, concatenate_datasets
from wikitext import UNKNOWN

WORDS = (4, 40)  # fewest and most words of a sentence


def with_other_text(train: Dataset, data_dir: str, model_dir: str, name: str) -> Dataset:
    """Return the training examples of a task and as many of other text, whose labels are 0.

    Args:
        train: tokenized training examples, with a column ``label``.
        data_dir: folder with one folder per data set.
        model_dir: folder of the tokenizer.
        name: name of the task, whose own files are not read.
    """
    task = glue.TASKS[name]
    texts = pairs_of(data_dir, name) if len(task.columns) == 2 else sentences_of(data_dir, name)
    rows = [{**dict(zip(task.columns, text, strict=True)), "label": 0} for text in texts]
    other = Dataset.from_list(rows).shuffle(seed=glue.SPLIT_SEED)
    other = other.select(range(min(len(train), len(other))))
    return concatenate_datasets([train, glue.tokenized(other, model_dir, task)])


def sentences_of(data_dir: str, name: str) -> list[tuple[str]]:
    """Return sentences of the other tasks and of WikiText-2."""
    texts = set(wikitext_sentences(data_dir))
    for task in glue.TASKS.values():
        if task.name != name:
            data = Dataset.from_parquet(os.path.join(data_dir, task.name, "train.parquet"))
            for column in task.columns:
                texts.update(text.strip() for text in data[column])
    return [(text,) for text in sorted(texts) if is_sentence(text)]


def pairs_of(data_dir: str, name: str) -> list[tuple[str, str]]:
    """Return pairs of the other task with pairs, and neighbors in WikiText-2."""
    pairs = [pair for pair in pairwise(wikitext_sentences(data_dir)) if all(map(is_sentence, pair))]
    for task in glue.TASKS.values():
        if task.name != name and len(task.columns) == 2:
            data = Dataset.from_parquet(os.path.join(data_dir, task.name, "train.parquet"))
            pairs += zip(data[task.columns[0]], data[task.columns[1]], strict=True)
    return pairs


def is_sentence(text: str) -> bool:
    """Return whether a text has the length of a sentence and no unknown word."""
    return WORDS[0] <= len(text.split()) <= WORDS[1] and UNKNOWN not in text


def wikitext_sentences(data_dir: str) -> list[str]:
    """Return the sentences of the training file of WikiText-2."""
    with open(os.path.join(data_dir, "wikitext2", "train.txt"), encoding="utf-8") as file:
        lines = [line.strip() for line in file if not line.strip().startswith("=")]
    parts = (part.strip(" .") for line in lines for part in line.split(" . "))
    return [f"{part} ." for part in parts if part]
