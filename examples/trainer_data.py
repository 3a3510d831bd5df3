"""Flags and data of the examples for trainers of other packages."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
from torch import nn
from transformers import TrainingArguments

from hf_quantnoise.configuration.options import option
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.runs.example_data import read_table
from hf_quantnoise.runs.loading import errors_name_model


@dataclass
class RowFlags:
    """Model, training and validation data."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder or a Hub repository."})
    dataset_name: str = field(metadata={"help": "Dataset on the Hub, if there are no files."})
    train_file: str | None = option(None, "Training data: a .jsonl, .json, .csv or .parquet file.")
    validation_file: str | None = option(None, "Validation data, in the same format.")
    train_split: str = option("train", "Training split of --dataset_name.")
    validation_split: str = option("test", "Validation split of it.")
    centroid_epochs: float = option(1.0, "Epochs of finetuning the quantized model; 0: none.")

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError(
                f"--train_file {self.train_file!r} and --validation_file {self.validation_file!r} "
                "must be used together; pass both, or none to use --dataset_name"
            )

    def check(self, training: TrainingArguments) -> None:
        """Raise a ``ValueError`` for a training flag that the examples would ignore."""
        for name in ("do_predict", "push_to_hub"):
            if getattr(training, name):
                raise ValueError(
                    f"--{name} is not supported; remove it (hf-quantnoise push uploads a model)"
                )

    def errors_name_model(self) -> AbstractContextManager[None]:
        """Return a context that raises the errors of loading the model with its name."""
        return errors_name_model("invalid --model_name_or_path", self.model_name_or_path)

    def require_dense(self, model: nn.Module) -> None:
        """Raise a ``ValueError`` for a packed model, which can be neither noised nor packed."""
        name = self.model_name_or_path
        if any(packed_layers(model)):
            raise ValueError(
                f"invalid --model_name_or_path {name!r}: it is compressed already; pass a dense "
                f"model (hf-quantnoise convert {name} FOLDER --to dense writes this one as dense)"
            )

    def read(self, name: str) -> Dataset:
        """Return the data of ``"train"`` or ``"validation"``."""
        path = getattr(self, f"{name}_file")
        if path is None:
            return load_dataset(self.dataset_name, split=getattr(self, f"{name}_split"))
        return read_table(f"{name}_file", path)

    def for_centroids(self, training: TrainingArguments) -> TrainingArguments:
        """Return the arguments for finetuning the quantized model."""
        second = copy.copy(training)
        second.output_dir = os.path.join(training.output_dir, "centroids")
        second.num_train_epochs, second.max_steps = self.centroid_epochs, -1
        return second
