"""Rows of other libraries on GLUE: bytes, figures, and errors about missing libraries."""

import importlib.util
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

pytest.importorskip("sklearn")

import glue
import glue_peers
import peer_libraries
from rows import runs_of


def run_main(monkeypatch, *words):
    command = ["glue_peers.py", "--data_dir", ".", "--start_results", "float32.jsonl"]
    command += ["--start_dir", "models", "--results", "rows.jsonl", "--tasks", "sst2", *words]
    monkeypatch.setattr("sys.argv", command)
    glue_peers.main()
    with open("rows.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_rows_of_this_package_have_true_bytes_and_figures(glue_start, monkeypatch):
    for _, _, setting in glue_peers.METHODS:
        if "n_codebooks" in setting.get("config", {}):  # the tables are too small for 512
            monkeypatch.setitem(setting["config"], "n_centroids", 16)
    methods = ["one shot", "one shot, two codebooks", "intN after training"]
    sizes = ["20x", "int4"]  # 20x counts the lookups of the training data
    words = ["--methods", *methods, "--sizes", *sizes]
    lines = run_main(monkeypatch, *words)
    assert [line["key"]["size"] for line in lines] == ["20x", "int4", "20x"]
    dense = os.path.getsize(os.path.join(glue_start, "model.safetensors"))
    for line in lines:
        assert line["steps"] == 0 and line["float32_bytes"] == dense
        assert line["bytes"] == line["file_bytes"] < dense / 2
        assert line["dev"]["divergence"] > 0
        right = [int(digit) for digit in line["dev_correct"]]
        assert len(right) == 24 and np.mean(right) == pytest.approx(line["dev"]["accuracy"])
    model = AutoModelForSequenceClassification.from_pretrained(glue_start)
    dev = glue.load(".", glue_start, "sst2").dev
    scores = glue.scores(glue.TASKS["sst2"], *glue.logits_of(model, dev, glue_start))
    assert lines[0]["dev_float32"] == pytest.approx(scores)
    assert len(runs_of(lines)) == 3
    assert len(run_main(monkeypatch, *words)) == 3, "finished rows are skipped"


@pytest.mark.parametrize("library", peer_libraries.INSTALL)
def test_missing_library_is_named_with_its_command(library, glue_start, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    method = {"torchao": glue_peers.TORCHAO, "quanto": glue_peers.QUANTO}[library]
    with pytest.raises(ImportError, match=rf"{library} is not installed; run `pip install .*--m"):
        run_main(monkeypatch, "--methods", method)


def test_packed_bytes_counts_bits_scales_and_zero_points():
    quantized = SimpleNamespace(
        qdata=torch.zeros(3, 7, dtype=torch.int8),
        scale=torch.ones(3, 1, dtype=torch.float16),
        zero_point=torch.tensor([[1], [0], [2]], dtype=torch.int8),
    )
    dense = torch.zeros(5)
    expected = math.ceil(2 * 21 / 8) + 6 + 3 + 20
    assert peer_libraries.packed_bytes([quantized, dense], 2) == expected
    quantized.zero_point.zero_()
    assert peer_libraries.packed_bytes([quantized], 8) == 21 + 6


# The int8 kernel of quanto 0.2.7 crashes the interpreter on layers as small as those of this model.
OTHERS = [
    setting
    for _, _, setting in glue_peers.METHODS
    if setting["library"] != "hf_quantnoise" and setting.get("weights") != "qint8"
]


@pytest.mark.parametrize("setting", OTHERS)
def test_other_libraries_give_the_saved_model(setting, glue_start, tmp_path):
    """Only with the library installed: few bits are far from float32, eight are close."""
    library = setting["library"]
    pytest.importorskip({"quanto": "optimum.quanto"}.get(library, library))
    model = AutoModelForSequenceClassification.from_pretrained(glue_start)
    options = {name: value for name, value in setting.items() if name != "library"}
    if options.get("group"):
        options["group"] = 32  # the hidden size
    path = str(tmp_path / "model.safetensors")
    small, size = glue_peers.QUANTIZERS[library](model, path, **options)
    assert 0 < size <= os.path.getsize(path) < os.path.getsize(f"{glue_start}/model.safetensors")
    dev = glue.load(".", glue_start, "sst2").dev
    expected, labels = glue.logits_of(model, dev, glue_start)
    figures, _, _ = glue_peers.figures_of_logits(
        glue.TASKS["sst2"], labels, expected, glue.logits_of(small, dev, glue_start)[0]
    )
    bits = options.get("bits") or int(options["weights"][-1])
    assert 0 < figures["divergence"] < {8: 0.01, 4: 0.5}.get(bits, math.inf)
