"""Checkpoints of ``comparison.py``: their data, one-shot storage, and runs that are timed."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "quality"))

import glue
import glue_peers
import language_model
import torch
import wikitext
from glue_compress import figures_of_logits
from glue_studies import STORAGE
from language_model_rows import MEGABYTES, main_study
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

GENERATED = 16  # tokens, after as many others


@dataclass(frozen=True)
class Case:
    """One timed call of ``run``, whose seconds are divided by ``per_run``."""

    run: Callable[[nn.Module], object]
    per_run: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """A finetuned float32 model, its data and its seed.

    Attributes:
        folder: of the model and its tokenizer.
        data_dir: folder of the data of all tasks.
    """

    folder: str
    data_dir: str
    seed: int

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The float32 model; do not change it."""
        return self.auto_class.from_pretrained(self.folder, dtype=torch.float32).eval()


class Classifier(Checkpoint):
    """MiniLM finetuned on SST-2 by ``glue_float32.py``."""

    name, title, task = "minilm", "SST-2, MiniLM", "sst2"
    metric, auto_class = "accuracy", AutoModelForSequenceClassification
    sizes = tuple(STORAGE)
    aqlm: ClassVar = {"block_size": 8, "n_codebooks": 2, "row_scale": True}
    # Rows of the GLUE study: file, study and method.
    trained = ("quality_glue.jsonl", "glue", "noise")

    @cached_property
    def data(self) -> glue.Data:
        return glue.load(self.data_dir, self.folder, self.task)

    @cached_property
    def expected(self):
        """Logits of the float32 model on dev, and labels."""
        return glue.logits_of(self.dense, self.data.dev, self.folder)

    def prepare(self) -> None:
        """Compute what all forms need once, so that processes inherit it."""
        _ = self.expected

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return accuracy, loss, divergence and agreement on dev."""
        expected, labels = self.expected
        logits, _ = glue.logits_of(model, self.data.dev, self.folder)
        return figures_of_logits(glue.TASKS[self.task], labels, expected, logits)[0]

    def pack(self, size: str, folder: str) -> None:
        """Write the model in a size, quantized in one shot as in ``glue_peers.py``."""
        setting = {"scheme": "ipq", "config": STORAGE[size]}
        key = {"setting": setting, "seed": self.seed}
        glue_peers.quantized_by_this_package(self.dense, folder, key, self.data.train)

    def cases(self) -> dict[str, Case]:
        """Return batches of random tokens."""
        found = {}
        for batch, length in ((1, 16), (1, 128), (32, 128)):
            ids = torch.randint(5, self.dense.config.vocab_size, (batch, length))
            found[f"{batch} x {length}"] = Case(partial(_classify, ids=ids))
        return found


@torch.inference_mode(False)  # in which int4 of optimum-quanto raises
@torch.no_grad()
def _classify(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


class LanguageModel(Checkpoint):
    """The small Llama finetuned on WikiText-2 by ``language_model_float32.py``."""

    name, title, task = "stories", "WikiText-2, Llama", "wikitext2"
    metric, auto_class = "perplexity", AutoModelForCausalLM
    sizes = tuple(MEGABYTES["stories"])
    aqlm: ClassVar = {"block_size": 4, "row_scale": True}
    trained = ("quality_language_model.jsonl", "language_model", "trained noise")

    @cached_property
    def texts(self) -> wikitext.Texts:
        folder = os.path.join(self.data_dir, self.task)
        return wikitext.load_texts(folder, self.folder, wikitext.length_of(self.name))

    def prepare(self) -> None:
        """Compute what all forms need once, so that processes inherit it."""
        _ = self.texts, self.dense

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return perplexity, loss, divergence and agreement on dev."""
        figures = wikitext.evaluate(model, self.texts.dev, self.dense)
        del figures["losses"]
        return figures

    def pack(self, size: str, folder: str) -> None:
        """Write the model in a size, quantized in one shot as in ``language_model.py``."""
        (row,) = (r for r in main_study(self.name, 0) if (r.method, r.size) == ("one shot", size))
        args = language_model.Arguments(
            study="language_model", model=self.name, data_dir=self.data_dir, start_dir=self.folder
        )
        model = self.auto_class.from_pretrained(self.folder, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as work:
            small, _ = language_model.train_and_compress(
                args, row, self.seed, self.texts, model, self.dense, work
            )
        small.save_pretrained(folder)

    def cases(self) -> dict[str, Case]:
        """Return the generation of tokens, one by one."""
        ids = torch.randint(5, self.dense.config.vocab_size, (1, GENERATED))
        return {"token": Case(partial(_generate, ids=ids), GENERATED)}


@torch.inference_mode(False)
@torch.no_grad()
def _generate(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
        min_new_tokens=GENERATED, max_new_tokens=GENERATED,
    )  # fmt: skip


CHECKPOINTS = {kind.name: kind for kind in (Classifier, LanguageModel)}
