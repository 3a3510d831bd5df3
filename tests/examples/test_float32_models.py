"""Float32 models of the quality studies: each is there or trained again, and has one row."""

import sys

import pytest
from results_file import append_or_compare, read_lines

pytest.importorskip("sklearn")

import glue_float32


def test_a_repetition_is_compared_with_the_row(tmp_path, capsys):
    path = str(tmp_path / "rows.jsonl")
    for f1, note in ((0.5, ""), (0.5, "equal to its row"), (0.25, "its row has {'f1': 0.5}")):
        append_or_compare(path, {"seed": 1}, {"seconds": f1, "dev": {"f1": f1}})
        assert note in capsys.readouterr().out
    (line,) = read_lines(path)
    assert line["dev"] == {"f1": 0.5}


def test_only_missing_rows_and_models_are_trained(tmp_path, monkeypatch):
    trained = []

    def finetune(args, key):
        trained.append((key["seed"], key["learning_rate"]))
        (tmp_path / "-".join(str(value) for value in key.values())).mkdir()
        metrics = {"f1": 1 - key["learning_rate"], "loss": 1.0}  # the lowest rate is the best
        append_or_compare(args.results, key, {"held_out": metrics, "dev": metrics})

    monkeypatch.setattr(glue_float32, "finetune", finetune)
    monkeypatch.setattr(
        sys, "argv", ["glue_float32.py", "--data_dir", "x", "--model_dir", "x", "--tasks", "mrpc",
                      "--results", str(tmp_path / "rows.jsonl"), "--work_dir", str(tmp_path)],
    )  # fmt: skip
    glue_float32.main()
    assert trained == [(42, 5e-5), (42, 1e-4), (42, 2e-4), (43, 5e-5), (44, 5e-5)]
    for folder in ("mrpc-43-5e-05-5", "mrpc-42-0.0002-5"):  # of another rate than the best
        (tmp_path / folder).rmdir()
    trained.clear()
    glue_float32.main()
    assert trained == [(43, 5e-5)]
