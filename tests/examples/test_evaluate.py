"""``hf-quantnoise eval`` against metrics, agreement and divergence computed by hand in float64."""

import copy
import json
import math
import re
import shutil

import numpy as np
import pandas
import pytest
import torch
from test_run_image_classification import NAMES, set_column, write_checkpoint, write_images
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_quantnoise import AutoQuantizedModel, IPQConfig, quantize_model
from hf_quantnoise.cli import COMMANDS, main
from hf_quantnoise.runs import latency

CONFIG = IPQConfig(block_size=8, n_centroids=2, kmeans_iter=2)
NEAR = ("--metrics", "sklearn", "--json")


def compress(folder, auto_class, **kwargs):
    """Save a model of a folder as ``out/dense`` and ``out/compressed`` beside it."""
    out = folder.parent / "out"
    dense = auto_class.from_pretrained(folder, **kwargs)
    with torch.no_grad():  # so that the outputs of examples differ
        for module in dense.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.mul_(8)
    for name, model in (("dense", dense), ("compressed", copy.deepcopy(dense))):
        shutil.copytree(folder, out / name)
        (out / name / "model.safetensors").unlink()
        if name == "compressed":
            quantize_model(model, CONFIG, progress=False)
        model.save_pretrained(out / name)
    return out


@pytest.fixture
def classifier(tiny_model, tmp_path, sentences, write, monkeypatch):
    """Folder with ``out/dense``, ``out/compressed`` and ``dev.csv``, the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "tiny")
    torch.manual_seed(0)
    compress(tmp_path / "tiny", AutoModelForSequenceClassification)
    texts, labels = sentences(40, 3)
    write("dev.csv", {"sentence": texts, "label": labels})
    return tmp_path


def run(capsys, *words):
    """Run ``eval`` with JSON output; return it."""
    capsys.readouterr()
    assert main(["eval", *words]) == 0
    return json.loads(capsys.readouterr().out)


def nearness(first, second):
    """Return agreement and mean KL of logits, in float64."""
    one, two = (logits.double().log_softmax(-1) for logits in (first, second))
    divergence = (one.exp() * (one - two)).sum(-1).mean().item()
    return (one.argmax(-1) == two.argmax(-1)).double().mean().item(), divergence


def test_eval_glue_equals_a_computation_by_hand(classifier, capsys):
    found = run(
        capsys, "glue", "out/dense", "out/compressed", "--validation_file", "dev.csv", *NEAR
    )
    frame = pandas.read_csv("dev.csv", keep_default_na=False)
    tokenizer = AutoTokenizer.from_pretrained("out/dense")
    models = [
        AutoModelForSequenceClassification.from_pretrained("out/dense").eval(),
        AutoQuantizedModel.from_pretrained("out/compressed").eval(),
    ]
    with torch.no_grad():
        logits = [
            torch.cat([m(**tokenizer(text, return_tensors="pt")).logits for text in frame.sentence])
            for m in models
        ]
    assert found["examples"] == 40 and found["task"] == "glue"
    for row, name, of_model in zip(found["models"], ("dense", "compressed"), logits, strict=True):
        assert row["model"] == f"out/{name}"
        files = (classifier / "out" / name).glob("*.safetensors")
        assert row["bytes"] == sum(file.stat().st_size for file in files)
        correct = (of_model.argmax(-1).numpy() == frame.label.to_numpy()).mean()
        assert row["metrics"]["accuracy"] == pytest.approx(correct)
        loss = nn.functional.cross_entropy(of_model.double(), torch.tensor(frame.label))
        assert row["metrics"]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        for key in ("milliseconds", "speed"):
            assert row[key].keys() == {"1", "8"} and min(row[key].values()) > 0
    dense, small = found["models"]
    assert dense["speed"] == {"1": 1.0, "8": 1.0}
    lengths = [len(ids) for ids in tokenizer([*frame.sentence[:8]])["input_ids"]]
    assert found["timed_input"] == "input_ids"
    assert found["timed_shapes"] == {"1": [1, lengths[0]], "8": [8, max(lengths)]}
    agreement, divergence = nearness(*logits)
    assert "agreement" not in dense and 0 < agreement < 1
    assert small["agreement"] == pytest.approx(agreement)
    assert small["divergence"] == pytest.approx(divergence, rel=1e-3)


def test_eval_prints_a_table_of_several_models(classifier, capsys, metric_folder):
    shutil.copytree(metric_folder, classifier, dirs_exist_ok=True)
    for example in COMMANDS["eval"].examples:
        assert main(example.split()[1:]) == 0
        out = capsys.readouterr().out
        if "--json" in example:
            json.loads(out)
    words = ["eval", "glue", "out/dense", "out/compressed", "out/dense"]
    words += ["--validation_file", "dev.csv", "--metrics", "sklearn", "--batch_size", "4"]
    assert main([*words, "--optimize", "float32"]) == 0
    table, about = capsys.readouterr().out.rstrip().split("\n\n")
    head, *rows = (line.split("  ") for line in table.splitlines())
    head, *rows = ([cell.strip() for cell in line if cell.strip()] for line in (head, *rows))
    assert head == ["model", "MB", "times smaller", "loss", "accuracy", "agreement", "divergence",
                    "ms (batch of 1)", "ms (batch of 4)"]  # fmt: skip
    assert [row[0] for row in rows] == ["out/dense", "out/compressed", "out/dense"]
    assert rows[2][5:7] == ["1.0000", "0.0000"]  # the dense model against itself
    assert [cell.split()[1] for cell in rows[0][-2:]] == ["(1.00x)", "(1.00x)"]
    assert all(re.fullmatch(r"\d+\.\d\d \(\d+\.\d\dx\)", cell) for cell in rows[1][-2:])
    assert "examples: 40" in about and "threads: " in about
    assert re.search(r"timed input_ids: 1 x \d+ and 4 x \d+$", about)


def test_latencies_do_not_depend_on_a_load_that_changes(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])

    class Model(nn.Module):
        device = torch.device("cpu")

        def __init__(self, name, cost):
            super().__init__()
            self.name, self.cost = name, cost

        def forward(self, x):
            clock[0] += self.cost * 2 ** (len(calls) // 3)  # each round is twice as slow
            calls.append(self.name)

    models = [Model("dense", 1.0), Model("slow", 4.0), Model("fast", 0.5)]
    found = latency.latencies(models, {"x": torch.zeros(1), "labels": torch.zeros(1)})
    assert calls == ["dense", "slow", "fast"] * 13
    assert [speed for _, speed in found] == [1.0, 0.25, 2.0]
    assert [time for time, _ in found] == [1e3 * cost * 2**7 for cost in (1.0, 4.0, 0.5)]


def test_eval_clm_counts_predicted_tokens(text_checkpoint, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    compress(text_checkpoint, AutoModelForCausalLM)
    words = ["out/dense", "out/compressed", "--validation_file", str(texts["validation"])]
    found = run(capsys, "clm", *words, "--sequence_length", "16", "--json")
    stream = AutoTokenizer.from_pretrained("out/dense")(texts["validation"].read_text())
    ids = torch.tensor(stream["input_ids"][: 15 * 16]).view(15, 16)
    models = [
        AutoModelForCausalLM.from_pretrained("out/dense").eval(),
        AutoQuantizedModel.from_pretrained("out/compressed").eval(),
    ]
    with torch.no_grad():
        logits = [model(ids).logits[:, :-1].flatten(0, 1) for model in models]
    agreement, divergence = nearness(*logits)
    small = found["models"][1]
    assert small["agreement"] == pytest.approx(agreement) and 0 < agreement < 1
    assert small["divergence"] == pytest.approx(divergence, rel=1e-3)
    for row, of_model in zip(found["models"], logits, strict=True):
        loss = nn.functional.cross_entropy(of_model.double(), ids[:, 1:].flatten()).item()
        assert row["metrics"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_eval_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    files = write_images(tmp_path)
    model = AutoModelForImageClassification.from_pretrained("model")
    model.config.id2label = dict(enumerate(NAMES))  # not sorted; those of the data are
    model.config.save_pretrained("model")
    set_column(files["validation"], "label", lambda labels: [NAMES[i] for i in labels])
    quantize_model(model, IPQConfig(block_size=4, n_centroids=4, kmeans_iter=2), progress=False)
    shutil.copytree("model", "small")
    model.save_pretrained("small")
    found = run(capsys, "images", "model", "small", "--validation_file", str(files["validation"]),
                *NEAR)  # fmt: skip
    dense, small = found["models"]
    assert small["bytes"] < dense["bytes"] and found["examples"] == 16
    assert 0 <= small["agreement"] <= 1 and small["divergence"] > 0
    assert np.isfinite(small["metrics"]["loss"])


def test_eval_of_a_regression_has_differences(classifier, capsys, sentences, write):
    folder = classifier / "r"
    folder.mkdir()
    shutil.copytree("tiny", folder / "tiny")
    compress(folder / "tiny", AutoModelForSequenceClassification, num_labels=1)
    texts, _ = sentences(12, 3)
    write("values.csv", {"sentence": texts, "label": [i / 10 for i in range(12)]})
    found = run(capsys, "glue", "r/out/dense", "r/out/compressed", "--validation_file",
                "values.csv", *NEAR)  # fmt: skip
    small = found["models"][1]
    assert "agreement" not in small and small["difference"] > 0
    assert "pearson" in small["metrics"]


@pytest.mark.parametrize("task", ["glue", "clm", "images"])
def test_eval_help_of_a_task_has_flags_in_use_and_examples(task, capsys):
    with pytest.raises(SystemExit):
        main(["eval", task, "--help"])
    text = capsys.readouterr().out
    assert "--validation_file" in text and "--max_eval_samples" in text
    for word in ("train", "--test_file", "predict", "shuffle"):
        assert word not in text
    assert text.rstrip().endswith("\n  ".join(["examples:", *COMMANDS["eval"].examples]))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["glue", "out/dense"], 2, "COMPRESSED"),
        (["glue", "out/dense", "out/compressed"], 1, "no data"),
        (["glue", "out/dense", "out/compressed", "--validation_fil"], 2, "--validation_fil"),
        (["glue", "out/none", "out/compressed", "--validation_file", "dev.csv"], 1, "out/none"),
        (["glue", "out/dense", "out/none", "--validation_file", "dev.csv"], 1, "out/none"),
        (["glue", "out/dense", "three", "--validation_file", "dev.csv"], 1, "same labels"),
        (
            ["glue", "tiny", "out/dense", "--validation_file", "dev.csv"],
            1,
            "'tiny' lacks 2 weights",
        ),
        (
            ["glue", "out/dense", "tiny", "--validation_file", "dev.csv"],
            1,
            "'tiny' lacks 2 weights",
        ),
        (["glue", "x", "y", "--batch_size", "0"], 2, "--batch_size 0"),
        (["glue", "x", "y", "--optimise", "bf16"], 2, "did you mean '--optimize'?"),
        (["clm", "x", "y"], 2, "no data"),
        (["glue", "x", "y", "--train_file", "dev.csv"], 2, "--train_file"),
        (["glue", "x", "y", "--test_file", "dev.csv"], 2, "--test_file"),
        (
            ["images", "x", "y", "--validation_file", "dev.csv", "--max_train_samples", "1"],
            2,
            "--max_train_samples",
        ),
    ],
)
def test_eval_errors_are_one_line(words, code, message, classifier, capsys):
    if "three" in words:
        kwargs = {"num_labels": 3}
        AutoModelForSequenceClassification.from_pretrained("tiny", **kwargs).save_pretrained(
            "three"
        )
    capsys.readouterr()
    if "--validation_file" in words:
        words = [*words, "--metrics", "sklearn"]
    try:
        found = main(["eval", *words])
    except SystemExit as stop:
        found = stop.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error: " in line]
    assert (found, out, len(lines)) == (code, "", 1) and message in lines[0], err
    assert "Traceback" not in err
