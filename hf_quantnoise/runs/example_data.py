"""Data that examples share: training and validation split, from files or from the Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..configuration.options import option
from ..repository import is_repository_name
from .known_flags import refuse

NOTHING_TO_DO = "nothing to do: pass --do_train, --do_eval or --stage_epochs above 0"
READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
# Only empty cells are missing values: by default the csv reader drops the sentence "null".
READER_OPTIONS = {"csv": {"keep_default_na": False, "na_values": [""]}}


def check_minimum(flags: Any, minimum: int, *names: str) -> None:
    """Raise a ``ValueError`` if a flag is below its minimum; None is valid."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < minimum:
            raise ValueError(f"invalid --{name} {value}: expected at least {minimum}")


def check_file(flag: str, path: str, kind: str) -> None:
    """Raise a ``FileNotFoundError`` that names the flag if there is no file."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"invalid --{flag} {path!r}: no such file; pass {kind}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"invalid --{flag} {path!r}: it is a folder; pass {kind}")


def read_table(flag: str, path: str, cache_dir: str | None = None, **options: Any) -> Dataset:
    """Return the rows of a parquet, csv, json or jsonl file; errors name the flag and the file."""
    kinds = f"a {', '.join(READERS)} file"
    check_file(flag, path, kinds)
    extension = os.path.splitext(path)[1].lower()
    if extension not in READERS:
        raise ValueError(f"invalid --{flag} {path!r}: unknown type {extension!r}, expected {kinds}")
    reader = READERS[extension]
    options = {"cache_dir": cache_dir, **READER_OPTIONS.get(reader, {}), **options}
    try:
        files = {"train": glob.escape(path)}  # which load_dataset reads as a pattern
        return load_dataset(reader, data_files=files, split="train", **options)
    except (DatasetGenerationError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(
            f"invalid --{flag} {path!r}: expected a {reader} file with at least one row "
            f"({error.__cause__ or error})"
        ) from error


def check_column(flag: str, column: str, rows: Dataset, source: str) -> None:
    """Raise a ``ValueError`` that names the flag if there is no such column."""
    if column not in rows.column_names:
        raise ValueError(
            f"invalid --{flag} {column!r}: expected one of the columns of {source}: "
            f"{', '.join(rows.column_names)}"
        )


def check_not_labels(flags: Any, *names: str) -> None:
    """Raise a ``ValueError`` if a flag names the column of ``--label_column``."""
    for name in names:
        if (column := getattr(flags, name)) == flags.label_column:
            raise ValueError(
                f"invalid --{name} {column!r}: it is the --label_column; pass another column for "
                "one of them"
            )


def is_text(rows: Dataset, column: str) -> bool:
    """Return whether a column has strings."""
    return getattr(rows.features[column], "dtype", None) in ("string", "large_string")


def check_text(flag: str, column: str, rows: Dataset, source: str) -> None:
    """Raise a ``ValueError`` that names the flag if a column does not have strings."""
    if not is_text(rows, column):
        raise ValueError(
            f"invalid --{flag} {column!r}: the column of {source} has {rows.features[column]}, "
            "expected text"
        )


def require_filled(rows: Dataset, columns: Iterable[str], source: str) -> None:
    """Raise a ``ValueError`` if a column has missing values."""
    for column in columns:
        if empty := rows.data.column(column).null_count:
            raise ValueError(
                f"{source} has {empty} of {len(rows)} rows with an empty column {column!r}; "
                "remove these rows or fill them in"
            )


def truncate(rows: Dataset | None, count: int | None) -> Dataset | None:
    """Return the first rows; all of them with ``count=None``."""
    return rows if rows is None or count is None else rows.select(range(min(count, len(rows))))


@dataclass
class FileArguments:
    """Training and validation data in files."""

    auto_class: ClassVar[Any]  # of the model
    elsewhere: ClassVar[Mapping[str, str]] = {}  # flag of other scripts -> what to do instead
    predicts: ClassVar[bool] = False  # whether --do_predict is supported
    needs_predictions: ClassVar[bool] = True  # for the metrics of the closing table

    train_file: str | None = option(None, "File of training data.")
    validation_file: str | None = option(None, "File of validation data.")
    max_train_samples: int | None = option(None, "Truncate the training data to N examples.")
    max_eval_samples: int | None = option(None, "Truncate the validation data to N examples.")

    def __post_init__(self) -> None:
        check_minimum(self, 1, "max_train_samples", "max_eval_samples")

    def check_quantization(self, flags: Any) -> None:
        """Raise a ``ValueError`` for a quantization flag with another meaning in other scripts."""

    def limit(self, split: str) -> int | None:
        """Return the maximum number of examples of a split."""
        return self.max_train_samples if split == "train" else self.max_eval_samples


@dataclass
class SplitArguments(FileArguments):
    """Data to train and evaluate on, from files or from a dataset on the Hub."""

    file_kind: ClassVar[str] = "a file"  # for errors

    dataset_name: str | None = option(None, "Dataset on the Hub, if there are no files.")
    validation_split: str = option("validation", "Validation split of the dataset on the Hub.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name is None and not (self.train_file or self.validation_file):
            raise ValueError(
                "no data: pass --validation_file (--train_file to train), or --dataset_name"
            )
        self._check_used()

    def _check_used(self) -> None:
        """Raise a ``ValueError`` that names a flag of the dataset that is not read."""
        name, config = self.dataset_name, getattr(self, "dataset_config_name", None)
        if name is not None and self.train_file and self.validation_file:
            raise refuse(
                "dataset_name",
                name,
                "is not read with --train_file and --validation_file; remove it, or one of these",
            )
        if name is None and config is not None:
            raise refuse("dataset_config_name", config, "requires --dataset_name; remove it")
        split = self.validation_split
        if split != type(self).validation_split and (name is None or self.validation_file):
            raise refuse(
                "validation_split",
                split,
                "selects from --dataset_name, which is not read for validation; pass "
                "--dataset_name without --validation_file, or remove --validation_split",
            )

    @property
    def has_train_data(self) -> bool:
        return bool(self.train_file or self.dataset_name)

    def evaluated_dataset(self) -> dict[str, str | None]:
        """Return the fields of the job that name the evaluation data; files have no name."""
        name = self.dataset_name
        if name is None or self.validation_file is not None:
            return {}
        return {
            "dataset": name,
            "dataset_id": name if is_repository_name(name) else None,
            "dataset_config": getattr(self, "dataset_config_name", None),
            "dataset_split": self.validation_split,
        }

    def file(self, split: str) -> str | None:
        """Return the file of the ``"train"`` or ``"validation"`` split, or None for the Hub."""
        flag = f"{split}_file"
        path = getattr(self, flag)
        if path is None and self.dataset_name is None:
            raise ValueError(f"missing --{flag}: expected {self.file_kind}")
        if path is not None:
            check_file(flag, path, self.file_kind)
        return path

    def load_from_hub(
        self, split: str, cache_dir: str | None, token: str | None, config: str | None = None
    ) -> Dataset:
        """Load the ``"train"`` or ``"validation"`` split of the dataset on the Hub."""
        is_train, dataset = split == "train", str(self.dataset_name)
        name = split if is_train else self.validation_split
        try:
            return load_dataset(dataset, config, split=name, cache_dir=cache_dir, token=token)
        except ValueError as error:
            if (reason := str(error)).startswith("Unknown split"):
                flag = f"--dataset_name {dataset!r}" if is_train else f"--validation_split {name!r}"
                advice = "pass --train_file" if is_train else "pass one of them"
                raise ValueError(f"invalid {flag}: {reason.rstrip('.')}; {advice}") from error
            raise
