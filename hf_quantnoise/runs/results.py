"""``results.json`` of a run."""

from __future__ import annotations

import os
import platform

import datasets
import torch
import transformers

from ..files.durable import write_json
from ..files.reading import read_json
from ..version import __version__


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

    def read_dense(self) -> None:
        """Read the results of the dense model from the file of an interrupted run."""
        if not os.path.isfile(self.path):
            raise ValueError(
                f"--resume_compression: {self.path} is missing, so there is no run to resume; pass "
                "the --output_dir of the interrupted run, or remove the flag"
            )
        values = read_json(self.path)
        if "dense" not in values:
            raise ValueError(
                f"--resume_compression: the run of {self.path} was interrupted before compression; "
                "pass --resume_from_checkpoint to resume its finetuning"
            )
        self.values["dense"] = values["dense"]


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {
        "hf_quantnoise": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }
