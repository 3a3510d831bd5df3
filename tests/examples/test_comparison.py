"""The comparison with other libraries: true bytes, scores, dense layers, speed, and reasons."""

import json
import os
import re
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForSequenceClassification

pytest.importorskip("sklearn")

import comparison
import comparison_checkpoints as checkpoints
import comparison_forms
import comparison_onnx
import glue
from comparison_table import tables
from results_file import read_lines
from speed import BASE

from hf_quantnoise.modeling import packed_layers

PACKED = "packed 20x"
PAGE = "before\n<!-- report: comparison -->\nold\n<!-- end of report -->\nafter\n"


@pytest.fixture
def start(glue_start, tmp_path):
    """The folder of a float32 model, in a folder with data, the row of its training and a page."""
    (tmp_path / "page.md").write_text(PAGE)
    return glue_start


def run(*words):
    flags = ["--data_dir", ".", "--models", "minilm", "--start_dir", "models", "--work_dir", "work"]
    flags += ["--start_results", "float32.jsonl", "--results", "rows.jsonl", "--page", "page.md"]
    comparison.main([*flags, "--trained_results", ".", *words])
    lines = read_lines("rows.jsonl")
    return {line["key"].get("form", line["key"].get("case")): line for line in lines}, lines


def row_of(page, form):
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {form} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_forms_have_true_bytes_scores_and_dense_layers(start, monkeypatch):
    forms = ["dense bf16", "torch dynamic int8", PACKED]
    found, lines = run("--forms", *forms)
    assert set(found) == {BASE, *forms}
    model = AutoModelForSequenceClassification.from_pretrained(start)
    matrices = {name: w.numel() for name, w in model.named_parameters() if w.dim() == 2}
    dense_file = os.path.getsize(os.path.join(start, "model.safetensors"))
    for name, line in found.items():
        folder = os.path.join("work", "minilm-42", re.sub("[ ]", "_", name))
        needed = [file for file in os.listdir(folder) if "token" not in file]
        assert line["bytes"] == sum(os.path.getsize(os.path.join(folder, f)) for f in needed)
        assert {"config.json"} < set(needed) and len(needed) == 2
        assert (line["bytes"] < dense_file) == (name != BASE)
        assert (line["dev"]["divergence"] > 0) == (name != BASE)
    assert found[BASE]["dense"] == found["dense bf16"]["dense"] == matrices
    assert found["torch dynamic int8"]["dense"] == {n: v for n, v in matrices.items() if "emb" in n}
    dev = glue.load(".", start, "sst2").dev
    reread = AutoModelForSequenceClassification.from_pretrained("work/minilm-42/packed_20x")
    scores = glue.scores(glue.TASKS["sst2"], *glue.logits_of(reread, dev, start))
    assert found[PACKED]["dev"] == pytest.approx(found[PACKED]["dev"] | scores)
    packed = {f"{name}.weight" for name, _ in packed_layers(reread)}
    assert found[PACKED]["dense"].keys() == matrices.keys() - packed and len(packed) > 12
    # finished forms are skipped
    monkeypatch.setattr(comparison, "isolated", None)
    assert run("--forms", *forms)[1] == lines


def test_latency_is_relative_to_float32_and_written_to_the_page(start, monkeypatch):
    case = checkpoints.Case(partial(checkpoints._classify, ids=torch.ones(2, 4, dtype=torch.long)))
    monkeypatch.setattr(checkpoints.Classifier, "cases", lambda self: {"2 x 4": case})
    with pytest.raises(ValueError, match="run without --latency first"):
        run("--latency")
    run("--forms", "dense bf16", PACKED)
    found, lines = run("--latency", "--repetitions", "2")
    figures = found["2 x 4"]["forms"]
    assert list(figures) == [BASE, "dense bf16", PACKED] and figures[BASE]["speed"] == 1
    assert lines[-1]["seconds"].keys() == figures.keys()
    with open("page.md", encoding="utf-8") as file:
        page = file.read()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    row = row_of(page, PACKED)
    assert row[1] == f"{lines[2]['bytes'] / 1e3:.1f}"
    assert row[2] == f"{lines[0]['bytes'] / lines[2]['bytes']:.1f}x"
    assert row[3] == f"{100 * lines[2]['dev']['accuracy']:.1f}"
    assert row[-3:] == [
        f"{figures[PACKED]['speed']:.2f}", f"{lines[-1]['seconds'][PACKED]:.2f}",
        "token_type_embeddings, classifier (1%)",
    ]  # fmt: skip
    assert row_of(page, "torch dynamic int8")[-1] == "not measured: not run"


def test_table_has_reasons_and_trained_models(start, monkeypatch):
    forms = {form.name: form for form in comparison_forms.forms(("20x",))}
    absent = replace(forms["AQLM format"], requires=("no_such_module",))
    monkeypatch.setitem(comparison_forms.INSTALL, "no_such_module", "pip install it")
    assert absent.missing_package() == "needs no_such_module: pip install it"

    def crash(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    broken = [replace(forms["dense bf16"], write=crash), absent]
    monkeypatch.setattr(comparison, "forms", lambda sizes: [forms[BASE], *broken, forms[PACKED]])
    found, lines = run()
    assert found["dense bf16"]["failed"] == "the process ended with SIGKILL"
    assert "AQLM format" not in found and len(run()[1]) == len(lines) + 1, "only it is retried"
    trained = {
        "key": {"study": "glue", "model": "minilm", "task": "sst2", "method": "noise",
                "size": "20x", "seed": 42, "setting": {}},
        "bytes": 1000, "float32_bytes": 9000, "steps": 7, "seconds": 1,
        "dev": {"accuracy": 0.875, "loss": 0.5, "divergence": 0.25},
        "dev_float32": {"accuracy": 0.9, "loss": 0.4},
    }  # fmt: skip
    (other,) = [json.loads(json.dumps(trained).replace('"noise"', '"no noise"'))]
    with open("quality_glue.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in (trained, other))
    page = tables(lines, ".")
    assert row_of(page, "dense bf16")[-1] == "not measured: the process ended with SIGKILL"
    row = row_of(page, "packed 20x, trained (7 steps, 1 seed)")
    config = os.path.getsize("work/minilm-42/packed_20x/config.json")
    assert row[1] == f"{(1000 + config) / 1e3:.1f}" and row[3:6] == ["87.5", "0.500", "0.2500"]


def test_empty_results_are_an_error():
    with pytest.raises(ValueError, match="no float32 form"):
        tables([], ".")


def test_error_of_a_form_is_its_reason():
    def fail():
        raise RuntimeError("first line\nsecond line")

    assert comparison.isolated(fail) == {"failed": "RuntimeError: first line"}
    assert comparison.isolated(dict, {"a": 1}) == {"a": 1}


def test_onnx_forms_give_the_saved_model(start, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    checkpoint = checkpoints.Classifier(start, ".", 42)
    forms = {form.name: form for form in comparison_forms.forms(("20x",))}
    folders = {}
    ids = torch.randint(5, 40, (3, 7))
    expected = checkpoint.dense(ids).logits.detach()
    matrices = [name for name, w in checkpoint.dense.named_parameters() if w.dim() == 2]
    for name, tolerance in (
        ("ONNX float32", 1e-4), ("ONNX dynamic int8", 1.0), (PACKED, 4.0),
        (f"{PACKED}, ONNX int8", 1.0),
    ):  # fmt: skip
        folders[name] = str(tmp_path / name)
        os.mkdir(folders[name])
        forms[name].write(checkpoint, folders[name], folders.get(forms[name].start, ""))
        model = forms[name].load(checkpoint, folders[name])
        found = model(ids).logits.detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        dense = comparison_forms.dense_matrices(checkpoint.dense, model)
        assert list(dense) == (matrices if name == "ONNX float32" else []) or PACKED in name
        if name == PACKED:
            expected = found


def test_llama_generates_the_same_tokens_in_onnx(text_checkpoint, tmp_path):
    checkpoint = checkpoints.LanguageModel(str(text_checkpoint), ".", 42)
    (case,) = checkpoint.cases().values()
    tokens = case.run(checkpoint.dense)
    assert tokens.shape == (1, 2 * checkpoints.GENERATED) and case.per_run == checkpoints.GENERATED
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    comparison_onnx.write_onnx(checkpoint, str(tmp_path), "")
    model = comparison_onnx.load_onnx(checkpoint, str(tmp_path))
    assert torch.equal(case.run(model), tokens)
    ids = torch.randint(5, 40, (2, 9))
    expected = checkpoint.dense(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
