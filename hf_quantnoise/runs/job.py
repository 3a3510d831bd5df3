"""Model, data and metadata that an example prepares for its run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer


@dataclass
class Job:
    """Model, data and metadata that an example prepares."""

    model: PreTrainedModel  # the checkpoint, with the head for the data
    parts: dict  # arguments of any Trainer: datasets, collator, metrics, processing class
    metric: str  # of the closing table
    task: str  # name on the Hub, for the model card, as is the dataset's
    dataset: str | None = None
    dataset_id: str | None = None  # repository of the dataset, if it is from the Hub
    dataset_config: str | None = None
    dataset_split: str | None = None  # of eval_dataset
    # Evaluated besides eval_dataset, by the suffix of their metrics.
    more_eval_datasets: dict[str, Dataset] = field(default_factory=dict)
    # Predicted by --do_predict, by the name of the file; and the text of each prediction.
    test_datasets: dict[str, Dataset] = field(default_factory=dict)
    prediction_texts: Callable[[Any], list[str]] = list
    # Computes more metrics from those of evaluate (perplexity from loss).
    add_scores: Callable[[dict[str, float]], dict[str, float]] = field(default=dict)

    def card_facts(self) -> dict[str, str | None]:
        """Return the arguments of the trainer's ``create_model_card``."""
        return {
            "tasks": self.task,
            "dataset": self.dataset,
            "dataset_tags": self.dataset_id,
            "dataset_args": self.dataset_config,
            "dataset_split": self.dataset_split,
        }

    def scores(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate; return the metrics without prefix, and those that the example adds."""
        scores = {}
        for suffix, rows in {"": None, **self.more_eval_datasets}.items():
            for name, value in trainer.evaluate(rows).items():
                scores[name.removeprefix("eval_") + suffix] = value
        return {**scores, **self.add_scores(scores)}
