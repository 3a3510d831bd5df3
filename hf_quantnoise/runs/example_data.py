"""Data flags that examples share: training and validation split, from files or from the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from ..configuration.options import option


def check_minimum(flags: Any, minimum: int, *names: str) -> None:
    """Raise a ``ValueError`` if a flag is below its minimum; None is valid."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < minimum:
            raise ValueError(f"invalid --{name} {value}: expected at least {minimum}")


@dataclass(frozen=True)
class Split:
    """Source of a split.

    Attributes:
        name: ``"train"`` or ``"validation"``.
        flag: the flag of its file.
        file: its file; None uses the dataset on the Hub.
        limit: maximum number of examples, or None.
    """

    name: str
    flag: str
    file: str | None
    limit: int | None


@dataclass
class SplitArguments:
    """Data to train and evaluate on.

    Attributes:
        content: kind of data, for errors.
        file_kind: kind of files, for errors.
    """

    content: ClassVar[str] = "data"
    file_kind: ClassVar[str] = "file"

    dataset_name: str | None = option(None, "Dataset on the Hub.")
    train_file: str | None = option(None, "File of training data.")
    validation_file: str | None = option(None, "File of validation data.")
    max_train_samples: int | None = option(None, "Truncate the training data to N examples.")
    max_eval_samples: int | None = option(None, "Truncate the validation data to N examples.")

    def __post_init__(self) -> None:
        if self.dataset_name is None and not (self.train_file or self.validation_file):
            raise ValueError(
                f"no {self.content}: pass --train_file and --validation_file, or --dataset_name"
            )
        check_minimum(self, 1, "max_train_samples", "max_eval_samples")

    @property
    def has_train_data(self) -> bool:
        """Whether there is training data."""
        return bool(self.train_file or self.dataset_name)

    def split(self, name: str) -> Split:
        """Return the ``"train"`` or ``"validation"`` split.

        Raises:
            ValueError: naming the flag, if its file is missing.
        """
        flag, file, limit = f"--{name}_file", self.train_file, self.max_train_samples
        if name == "validation":
            file, limit = self.validation_file, self.max_eval_samples
        if file is None and self.dataset_name is None:
            raise ValueError(f"missing {flag}: the {name} split needs {self.file_kind}")
        if file is not None and not os.path.isfile(file):
            raise ValueError(f"invalid {flag} {file!r}: expected {self.file_kind}")
        return Split(name, flag, file, limit)
