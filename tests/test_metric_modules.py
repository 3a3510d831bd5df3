"""Metrics of ``evaluate`` in ``QuantNoiseTrainer``, and its evaluator on a compressed model."""

import re
import sys

import numpy as np
import pytest
from datasets import Dataset
from support.tiny import make_model
from support.trainers import ATTENTION, make_trainer
from support.words import words
from transformers import EvalPrediction, pipeline

from hf_quantnoise import CompressionArguments, quantize_model
from hf_quantnoise.metric_modules import ModuleMetrics, as_compute_metrics

evaluate = pytest.importorskip("evaluate")

LOGITS = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
LABELS = np.array([1, 0, 0, 1])


@pytest.fixture
def accuracy(metric_folder):
    return evaluate.load(str(metric_folder / "accuracy"))


@pytest.mark.parametrize("form", ["module", "folder", "script"])
def test_trainer_scores_with_a_module_before_and_after_compression(
    form, accuracy, metric_folder, tmp_path, parity_data
):
    folder = metric_folder / "accuracy"
    given = {"module": accuracy, "folder": folder, "script": str(folder / "accuracy.py")}[form]
    rows = parity_data.select(range(32))
    parts = {"eval_dataset": rows, "compute_metrics": given}
    trainer = make_trainer(tmp_path, make_model("bert"), parity_data, parts=parts)
    small = trainer.compress(ATTENTION, CompressionArguments(stage_epochs=0, plots=False))
    batch = {name: np.array(rows[name]) for name in rows.column_names}
    logits = trainer.predict(rows.remove_columns("labels")).predictions
    expected = (logits.argmax(-1) == batch["labels"]).mean()
    assert trainer.evaluate()["eval_accuracy"] == expected
    assert trainer.compression_history[-1]["metric"]["eval_accuracy"] == expected
    assert "eval_accuracy" in trainer.compression_history[0]["metric"]
    assert small is trainer.model


def test_module_scores_logits_values_and_decided_classes(metric_folder):
    score = as_compute_metrics(evaluate.load(str(metric_folder / "glue"), "mrpc"))
    assert score(EvalPrediction((LOGITS, "hidden"), LABELS)) == {"accuracy": 0.75, "f1": 0.8}
    assert score(EvalPrediction(LOGITS.argmax(-1), LABELS)) == {"accuracy": 0.75, "f1": 0.8}
    score = as_compute_metrics(evaluate.load(str(metric_folder / "glue"), "stsb"))
    values = EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([2.0, 4.0, 8.0]))
    assert score(values) == pytest.approx({"pearson": 1.0, "spearmanr": 1.0})


def test_batches_are_scored_together(metric_folder):
    """As with ``TrainingArguments(batch_eval_metrics=True)``; F1 is not the mean over batches."""
    score = as_compute_metrics(evaluate.load(str(metric_folder / "glue"), "mrpc"))
    assert score(EvalPrediction(LOGITS[:1], LABELS[:1]), compute_result=False) == {}
    result = score(EvalPrediction(LOGITS[1:], LABELS[1:]), compute_result=True)
    assert result == {"accuracy": 0.75, "f1": 0.8}


def test_combined_modules(metric_folder, accuracy):
    both = evaluate.combine([accuracy, evaluate.load(str(metric_folder / "glue"), "cola")])
    found = as_compute_metrics(both)(EvalPrediction(LOGITS, LABELS))
    assert found.keys() == {"accuracy", "matthews_correlation"}


def test_functions_and_none_are_returned_as_they_are():
    assert as_compute_metrics(None) is None
    assert as_compute_metrics(len) is len


def test_other_objects_and_shapes_are_named(accuracy):
    with pytest.raises(TypeError, match=r"invalid compute_metrics: got int 3, .*; pass"):
        as_compute_metrics(3)
    for shape, labels in (
        ((2, 5, 4), np.zeros((2, 5), dtype=int)),  # per token
        ((3, 2), np.zeros((3, 2))),  # several labels
        ((3, 2), np.zeros(3)),  # a value, and two outputs
    ):
        message = rf"accuracy needs one label .*{re.escape(str(labels.shape))}.*{shape[0]}.*; pass"
        with pytest.raises(ValueError, match=f"^invalid compute_metrics: {message}"):
            ModuleMetrics(accuracy)(EvalPrediction(np.zeros(shape), labels))


def test_module_that_is_nowhere_is_named_without_a_request(metric_folder, monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError("a request was made")

    monkeypatch.setattr("requests.request", connect)
    with pytest.raises(
        FileNotFoundError, match=r"^invalid compute_metrics='me/absent': .*; pass the"
    ):
        as_compute_metrics("me/absent")
    with pytest.raises(
        ValueError, match=r"compute_metrics='.*glue': .* None \(.*; pass the folder"
    ):
        as_compute_metrics(metric_folder / "glue")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    message = "^compute_metrics='accuracy' requires evaluate; run pip install evaluate, or pass"
    with pytest.raises(ImportError, match=message):
        as_compute_metrics("accuracy")


def test_evaluator_runs_on_a_compressed_model(tmp_path, accuracy):
    model = make_model("bert")
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    small = quantize_model(model, ATTENTION)
    small.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    rows = Dataset.from_dict(
        {"text": [f"w{i} w{7 * i % 300}" for i in range(5, 45)], "label": [0, 1] * 20}
    )
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    found = [small.config.label2id[row["label"]] for row in classify(list(rows["text"]))]
    expected = np.mean(np.array(found) == rows["label"])
    task = evaluate.evaluator("text-classification")
    # Not a pipeline object: evaluate 0.4.6 compares it with a class that transformers 5 removed.
    for given, tokenizer in ((str(tmp_path), None), (classify.model, words())):
        result = task.compute(
            given,
            rows,
            metric=accuracy,
            tokenizer=tokenizer,
            label_mapping=small.config.label2id,
        )
        assert result["accuracy"] == expected
        assert result["total_time_in_seconds"] > 0
