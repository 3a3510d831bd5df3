"""``results.json`` of a run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import torch
import transformers

from ..files.durable import write_json
from ..files.reading import read_json
from ..version import __version__

# Flags that a resumed run may change. So may those of files, which another machine has elsewhere.
_MAY_CHANGE = ("resume_compression", "card_template", "plots", "teacher_device", "overwrite_cache")
# Those of TrainingArguments that are compared.
_TRAINING = ("seed", "learning_rate", "num_train_epochs", "max_steps")


class ResultsFile:
    """``results.json``, written again with each result, so that an interrupted run has some.

    ``enabled`` is False on ranks that do not write.
    """

    def __init__(self, folder: str, enabled: bool = True) -> None:
        self.path = os.path.join(folder, "results.json")
        self.enabled = enabled
        self.values: dict = {}

    def add(self, **values) -> None:
        """Add results and write the file."""
        self.values.update(values)
        if not self.enabled:
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        write_json(self.values, self.path, default=str)

    def read_dense(self, arguments: Mapping[str, Any]) -> None:
        """Read the results of the dense model from the file of an interrupted run.

        Raises:
            ValueError: if the run is missing, or was started with other flags than ``arguments``.
        """
        if not os.path.isfile(self.path):
            raise ValueError(
                f"--resume_compression: {self.path} is missing, so there is no run to resume; pass "
                "the --output_dir of the interrupted run, or remove the flag"
            )
        values = read_json(self.path)
        if "dense" not in values:
            raise ValueError(
                f"--resume_compression: the run of {self.path} was interrupted before compression; "
                "pass --resume_from_checkpoint with its newest checkpoint to resume its finetuning"
            )
        if changes := list(_changes(values.get("arguments", {}), arguments)):
            raise ValueError(
                f"--resume_compression: the run of {self.path} was started with "
                f"{', '.join(changes)}; pass the same flags, or remove --resume_compression to "
                "start from scratch"
            )
        self.values["dense"] = values["dense"]


def _changes(stored: Mapping[str, Any], arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield the flags that differ from the stored ones; those of another version are skipped."""
    current = json.loads(json.dumps(arguments, default=str))
    for part in ("flags", "data", "compression", "training"):
        for name, value in stored.get(part, {}).items():
            if name in _MAY_CHANGE or name.endswith("_file") or name not in current[part]:
                continue
            if (part != "training" or name in _TRAINING) and value != current[part][name]:
                yield f"--{name} {value} (now {current[part][name]})"


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {
        "hf_quantnoise": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }
