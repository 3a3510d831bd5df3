#!/usr/bin/env python
"""Finetune sentence embeddings with quantization noise, then compress them.

    python examples/sentence_transformer_with_noise.py --output_dir out
    python examples/sentence_transformer_with_noise.py --train_file train.csv \\
      --validation_file valid.csv --output_dir out

The columns are ``sentence1``, ``sentence2`` and ``score`` from 0 to 1. The noise is a callback of
``SentenceTransformerTrainer``. The encoder of the finetuned model is quantized in one shot and
finetuned again, including its centroids. The metric is Spearman's correlation between the cosine
similarities and the scores. All flags of ``SentenceTransformerTrainingArguments`` are accepted.
Requires ``pip install hf-quantnoise[examples,sentence-transformers]``.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from trainer_data import RowFlags

from hf_quantnoise import QuantNoiseCallback, quantize_model, remove_quant_noise
from hf_quantnoise.compat import undo_accelerate_prepare
from hf_quantnoise.runs.closing_table import Row, closing_table, weights_mb
from hf_quantnoise.runs.config_flags import ConfigFlags
from hf_quantnoise.runs.example_data import require_filled
from hf_quantnoise.runs.script import ScriptParser, run_script

COLUMNS = ["sentence1", "sentence2", "score"]


@dataclass
class PairFlags(RowFlags):
    """Model and data."""

    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Checkpoint: a folder or a Hub repository."},
    )
    dataset_name: str = field(
        default="sentence-transformers/stsb",
        metadata={"help": "Dataset on the Hub, if there are no files."},
    )


def read_pairs(flags: PairFlags, name: str) -> Dataset:
    """Return the pairs of ``"train"`` or ``"validation"``, without further columns.

    The trainer would take the first columns as the sentences, whatever their names.

    Raises:
        ValueError: if a column is missing or empty, or a score is not one of a cosine.
    """
    rows, source = flags.read(name), getattr(flags, f"{name}_file") or flags.dataset_name
    if missing := [column for column in COLUMNS if column not in rows.column_names]:
        raise ValueError(
            f"{source} lacks the columns {', '.join(missing)}; its columns are "
            f"{', '.join(rows.column_names)}; rename them"
        )
    rows = rows.select_columns(COLUMNS)
    require_filled(rows, COLUMNS, source)
    kind = str(getattr(rows.features["score"], "dtype", "lists"))
    if not kind.startswith(("float", "int")):
        raise ValueError(f"{source} has a column 'score' of {kind}, expected values from 0 to 1")
    low, high = min(rows["score"]), max(rows["score"])
    if low < -1 or high > 1:
        raise ValueError(
            f"{source} has a column 'score' from {low} to {high}, expected -1 to 1; rescale it"
        )
    return rows


def make_parser() -> ScriptParser:
    """Return the parser of the command line."""
    kinds = [PairFlags, ConfigFlags, SentenceTransformerTrainingArguments]
    return ScriptParser(kinds, description=__doc__.splitlines()[0])


def main(argv: list[str] | None = None) -> list[Row]:
    """Run the example; return the rows of its closing table.

    Raises:
        RuntimeError: if the loaded model has other embeddings than the saved one.
    """
    flags, compression, training = make_parser().parse_args_into_dataclasses(argv)
    flags.check(training)
    noise_config = compression.noise_config(training.seed)
    small_config = compression.config(training.seed)
    dense, compressed = (os.path.join(training.output_dir, n) for n in ("dense", "compressed"))
    train, validation = read_pairs(flags, "train"), read_pairs(flags, "validation")
    evaluator = EmbeddingSimilarityEvaluator(
        list(validation["sentence1"]), list(validation["sentence2"]), list(validation["score"]),
        write_csv=False,
    )  # fmt: skip

    def score(model: SentenceTransformer) -> float:
        return float(evaluator(model)["spearman_cosine"])

    with flags.errors_name_model():
        model = SentenceTransformer(flags.model_name_or_path, model_kwargs={"dtype": "float32"})
    flags.require_dense(model)
    callbacks = [QuantNoiseCallback(noise_config)] if noise_config else []
    trainer = SentenceTransformerTrainer(
        model, training, train_dataset=train, eval_dataset=validation,
        loss=CosineSimilarityLoss(model), callbacks=callbacks,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    dense_score = score(model)
    remove_quant_noise(model)
    model.save_pretrained(dense)

    quantize_model(model[0].auto_model, small_config)  # in place
    one_shot_score = score(model)
    if flags.centroid_epochs > 0:
        second = flags.for_centroids(training)
        SentenceTransformerTrainer(
            model, second, train_dataset=train, eval_dataset=validation,
            loss=CosineSimilarityLoss(model),
        ).train()  # fmt: skip
    model.save_pretrained(compressed)

    undo_accelerate_prepare(model)  # mixed precision, which the loaded model does not have
    fresh = SentenceTransformer(compressed, device=str(model.device))
    sentences = validation["sentence1"][:8]
    if not torch.equal(
        fresh.encode(sentences, convert_to_tensor=True),
        model.encode(sentences, convert_to_tensor=True),
    ):
        raise RuntimeError("the loaded model has other embeddings than the saved one")
    small_mb = weights_mb(compressed)
    rows = [
        Row("finetuned, float32", weights_mb(dense), dense_score),
        Row("quantized in one shot", small_mb, one_shot_score),
        Row("centroids finetuned, loaded", small_mb, score(fresh)),
    ]
    print(f"\n{closing_table(rows, 'Spearman')}")
    return rows


if __name__ == "__main__":
    sys.exit(run_script(main, make_parser()))
