"""Flags and rows of the examples that train with another package's trainer."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import TrainingArguments

from hf_quantnoise.runs.glue_data import READERS


@dataclass
class RowFlags:
    """Which model, and what to train and evaluate on."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder or a Hub repository."})
    dataset_name: str = field(metadata={"help": "Dataset on the Hub, unless files are given."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training rows: .jsonl, .json, .csv or .parquet."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Rows that are scored, in the same form."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of --dataset_name."})
    validation_split: str = field(default="test", metadata={"help": "Split that is scored."})
    centroid_epochs: float = field(
        default=1.0, metadata={"help": "Epochs that the packed model is finetuned for; 0: none."}
    )

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError(
                f"--train_file {self.train_file!r} and --validation_file {self.validation_file!r} "
                "go together; give both, or neither to take --dataset_name"
            )
        for flag in ("train_file", "validation_file"):
            name = getattr(self, flag)
            if name is None:
                continue
            if not Path(name).is_file():
                raise ValueError(f"--{flag} {name!r} is no file")
            if Path(name).suffix not in READERS:
                raise ValueError(f"--{flag} {name!r} is none of {', '.join(READERS)}")

    def read(self, name: str) -> Dataset:
        """The rows of ``"train"`` or ``"validation"``."""
        file_name = getattr(self, f"{name}_file")
        if file_name is None:
            return load_dataset(self.dataset_name, split=getattr(self, f"{name}_split"))
        reader = READERS[Path(file_name).suffix]
        return load_dataset(reader, data_files=file_name, split="train")

    def for_centroids(self, training: TrainingArguments) -> TrainingArguments:
        """The run's arguments, for the finetuning of the packed model."""
        second = copy.copy(training)
        second.output_dir = os.path.join(training.output_dir, "centroids")
        second.num_train_epochs, second.max_steps = self.centroid_epochs, -1
        return second
