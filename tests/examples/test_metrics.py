"""Scores of runs: a module of ``evaluate`` or scikit-learn, and what happens without the Hub."""

import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_quantnoise.metric_modules import load_module
from hf_quantnoise.runs.glue import main
from hf_quantnoise.runs.glue_data import TASKS, DataArguments
from hf_quantnoise.runs.metrics import METRICS, sklearn_metrics

ROOT = Path(__file__).parents[2]


def predictions_for(task: str) -> EvalPrediction:
    """Return random logits and labels that agree more often than by chance."""
    rng = np.random.default_rng(sorted(TASKS).index(task))
    if task == "stsb":
        labels = rng.integers(0, 6, 60).astype(np.float32)  # with equal values
        return EvalPrediction((labels + rng.normal(size=60).astype(np.float32))[:, None], labels)
    labels = rng.integers(0, 3 if task == "mnli" else 2, 60)
    logits = rng.normal(size=(60, labels.max() + 1))
    logits[np.arange(60), labels] += 1
    return EvalPrediction(logits.astype(np.float32), labels)


@pytest.mark.parametrize("source", ["by definition", "evaluate"])
@pytest.mark.parametrize("task", TASKS)
def test_sklearn_scores_are_those_of_the_module(task, source, metric_folder):
    path = str(metric_folder / "glue") if source == "by definition" else "glue"
    if source == "evaluate":  # the real one, if an earlier run with the Hub left it in the cache
        try:
            load_module(path, task, "", "")
        except FileNotFoundError:
            pytest.skip("evaluate's glue metric is not in its cache, and tests are offline")
    names = TASKS[task].metrics
    scores = []
    for metrics in (path, "sklearn"):
        compute, first = DataArguments(metrics=metrics).scoring(names, "glue", task)
        assert first == names[0]
        scores.append(compute(predictions_for(task)))
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert scores[0].keys() == set(names)


def run(model, folder, files, *flags):
    return main(
        [
            *("--model_name_or_path", model, "--output_dir", str(folder / "out"), *files),
            *("--cache_dir", str(folder / "cache"), "--do_train", "False", "--compress", "False"),
            *("--use_cpu", "--disable_tqdm", "True", "--plots", "False", *flags),
        ]
    )


def test_run_scores_with_a_module_by_name_and_folder(
    tiny_model, write_sets, tmp_path, metric_folder, monkeypatch
):
    files = write_sets("parquet", pair=True)
    results = {}
    for metrics in (str(metric_folder / "glue"), "sklearn"):
        flags = ["--task_name", "mrpc", "--metrics", metrics]
        results[metrics] = run(tiny_model, tmp_path, files, *flags)
    scores = [result["dense"]["metrics"] for result in results.values()]
    assert [score["f1"] for score in scores] == [scores[0]["f1"]] * 2
    # Without a task the default is a metric named accuracy, here one in the current folder.
    monkeypatch.chdir(metric_folder)
    found = run(tiny_model, tmp_path, files)["dense"]["metrics"]
    assert found["accuracy"] == scores[0]["accuracy"] and "f1" not in found


def test_metric_of_a_user_is_that_of_the_closing_table(tiny_model, write_sets, tmp_path, capsys):
    pytest.importorskip("evaluate")
    script = tmp_path / "errors" / "errors.py"
    script.parent.mkdir()
    source = (
        "import datasets\nimport evaluate\n"
        "class Errors(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        kind = datasets.Value('int64')\n"
        "        features = datasets.Features({'predictions': kind, 'references': kind})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'errors': sum(p != r for p, r in zip(predictions, references))}\n"
    )
    script.write_text(source)
    results = run(tiny_model, tmp_path, write_sets(), "--metrics", str(script))
    assert results["metric"] == "errors" and 0 <= results["dense"]["metrics"]["errors"] <= 24
    assert "errors" in capsys.readouterr().out.splitlines()[-3]
    script.write_text(source.replace("int64", "string"))
    with pytest.raises(ValueError, match=r"invalid --metrics '.*errors.py': .*\[0, 1\].*; pass"):
        run(tiny_model, tmp_path, write_sets(), "--metrics", str(script))


def test_sklearn_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "hf_quantnoise.runs.metrics"):
        DataArguments(metrics="sklearn").scoring(("accuracy",), "accuracy", None)
    assert "--metrics sklearn" in caplog.text


@pytest.mark.parametrize("flags", [[], ["--metrics", "me/own"]])
def test_metric_without_the_hub_is_an_error_that_lists_what_to_do(
    flags, tiny_model, write_sets, tmp_path, monkeypatch
):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [*sys.path])  # evaluate adds the folder
    message = r"^invalid --metrics '(glue' \(the default\)|me/own'): .*--metrics sklearn.*folder"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        run(tiny_model, tmp_path, write_sets(), "--task_name", "sst2", *flags)
    if not flags:
        page = " ".join((ROOT / "docs/how_to/metrics.md").read_text().split())
        assert f"hf-quantnoise finetune glue: error: {caught.value}" in page
    # No metric is loaded if nothing is scored.
    training = ["--do_train", "True", "--max_steps", "1", "--do_eval", "False", "--noise", "none"]
    run(tiny_model, tmp_path, write_sets()[:2], *training)


def test_metrics_against_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    predicted = np.where(rng.random(200) < 0.7, labels, 1 - labels)
    hit = predicted == labels
    tp, tn = (hit & (labels == 1)).sum(), (hit & (labels == 0)).sum()
    fp, fn = (~hit & (labels == 0)).sum(), (~hit & (labels == 1)).sum()
    assert METRICS["accuracy"](predicted, labels) == pytest.approx((tp + tn) / 200)
    assert METRICS["f1"](predicted, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert METRICS["matthews_correlation"](predicted, labels) == pytest.approx(matthews)
    x, y = rng.normal(size=(2, 50))
    assert METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    assert METRICS["spearmanr"](x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_predictions_are_computed_from_logits():
    logits = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
    labels = np.array([1, 0, 0, 1])
    compute = sklearn_metrics(("accuracy", "f1"))
    assert compute(EvalPrediction((logits, "hidden"), labels)) == {"accuracy": 0.75, "f1": 0.8}
    compute = sklearn_metrics(("pearson",))
    predictions = EvalPrediction(np.array([[1.0], [2.0], [3.0]]), np.array([2.0, 4.0, 6.0]))
    assert compute(predictions)["pearson"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ("./glue", "invalid --metrics './glue': no such folder or script; pass --metrics sklearn"),
        ("no_such_metric", "invalid --metrics 'no_such_metric': expected the folder or script"),
        (None, "invalid --metrics 'no_default' (the default): expected the folder or script"),
    ],
)
def test_missing_modules_are_named(metrics, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        DataArguments(metrics=metrics).scoring(("accuracy",), "no_default", None)
