"""GLUE tasks of the quality studies: data with a held-out split, metrics, evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoTokenizer, BatchEncoding, DataCollatorWithPadding, PreTrainedModel

# Every setting is chosen on these examples of the training file, which no training run sees.
HELD_OUT_SHARE, HELD_OUT_MAX, SPLIT_SEED = 0.1, 2000, 0


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return the share of equal entries."""
    return float((labels == predictions).mean())


@dataclass(frozen=True)
class Task:
    """A GLUE task: its columns, its metric, and the longest input in tokens."""

    name: str
    columns: tuple[str, ...]
    metric_name: str
    metric: Callable[[np.ndarray, np.ndarray], float]
    max_length: int = 128


TASKS = {
    task.name: task
    for task in (
        Task("sst2", ("sentence",), "accuracy", accuracy, 64),
        Task("cola", ("sentence",), "matthews_correlation", matthews_corrcoef, 64),
        Task("mrpc", ("sentence1", "sentence2"), "f1", f1_score),
        Task("rte", ("sentence1", "sentence2"), "accuracy", accuracy, 256),
    )
}


@dataclass(frozen=True)
class Data:
    """Tokenized splits of a task; ``train`` and ``held_out`` are those of the training file."""

    train: Dataset
    held_out: Dataset
    dev: Dataset


def tokenized(data: Dataset, model_dir: str, task: Task) -> Dataset:
    """Return texts in the columns of a task as inputs of a model, with their labels."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return data.map(
        lambda rows: tokenizer(
            *(rows[column] for column in task.columns), truncation=True, max_length=task.max_length
        ),
        batched=True, remove_columns=[c for c in data.column_names if c != "label"],
    )  # fmt: skip


@cache
def load(data_dir: str, model_dir: str, name: str) -> Data:
    """Read and tokenize the files of a task."""

    def read(file: str) -> Dataset:
        data = Dataset.from_parquet(os.path.join(data_dir, name, file))
        return tokenized(data, model_dir, TASKS[name])

    shuffled = read("train.parquet").shuffle(seed=SPLIT_SEED)
    held = min(HELD_OUT_MAX, int(len(shuffled) * HELD_OUT_SHARE))
    return Data(
        train=shuffled.select(range(held, len(shuffled))),
        held_out=shuffled.select(range(held)),
        dev=read("dev.parquet"),
    )


def batches_of(data: Dataset, model_dir: str) -> list[BatchEncoding]:
    """Return the texts of a split in batches of 64, padded, without labels."""
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(model_dir))
    rows = data.remove_columns("label")
    starts = range(0, len(rows), 64)
    return [
        collate([rows[row] for row in range(start, min(start + 64, len(rows)))]) for start in starts
    ]


@torch.no_grad()
def logits_of(
    model: PreTrainedModel, data: Dataset, model_dir: str
) -> tuple[torch.Tensor, np.ndarray]:
    """Return logits in float32 and labels, in the order of the data."""
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(model_dir))
    order = np.argsort([len(ids) for ids in data["input_ids"]], kind="stable")
    model.eval()
    logits = torch.empty(len(data), model.config.num_labels)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch = collate([data[int(row)] for row in rows])
        batch.pop("labels", None)
        logits[rows] = model(**batch).logits.float()
    return logits, np.array(data["label"])


def scores(task: Task, logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Return the metric of the task and the mean cross-entropy in nats."""
    loss = F.cross_entropy(logits, torch.from_numpy(labels)).item()
    return {task.metric_name: float(task.metric(labels, logits.argmax(-1).numpy())), "loss": loss}
