"""Data flags that examples share: a training and a validation split, from files or from the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Split:
    """Where one split comes from.

    Attributes:
        name: ``"train"`` or ``"validation"``.
        flag: the flag that names its file.
        file: that file; None takes the Hub's dataset.
        limit: most examples, or None.
    """

    name: str
    flag: str
    file: str | None
    limit: int | None


@dataclass
class SplitArguments:
    """What to train and evaluate on.

    Attributes:
        content: what the data are, for errors.
        file_kind: what their files are.
    """

    content: ClassVar[str] = "data"
    file_kind: ClassVar[str] = "file"

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub."})
    train_file: str | None = field(default=None, metadata={"help": "Training data."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use fewer examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use fewer examples."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and not (self.train_file or self.validation_file):
            raise ValueError(
                f"no {self.content}: give --train_file and --validation_file, or --dataset_name of "
                "the Hub"
            )

    @property
    def has_train_data(self) -> bool:
        """Whether there is something to train on."""
        return bool(self.train_file or self.dataset_name)

    def split(self, name: str) -> Split:
        """The ``"train"`` or ``"validation"`` split.

        Raises:
            ValueError: naming the flag, if its file is not given or not there.
        """
        flag, file, limit = f"--{name}_file", self.train_file, self.max_train_samples
        if name == "validation":
            file, limit = self.validation_file, self.max_eval_samples
        if file is None and self.dataset_name is None:
            raise ValueError(f"the {name} split needs {flag}; give it {self.file_kind}")
        if file is not None and not os.path.isfile(file):
            raise ValueError(f"{flag} {file!r} is no file; give {self.file_kind}")
        return Split(name, flag, file, limit)
