"""The command line as a whole: help, examples, exit codes, errors of one line."""

import importlib
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

from hf_quantnoise.cli import COMMANDS, main

EVERY = list(COMMANDS)


@pytest.mark.parametrize("name", EVERY)
def test_help_ends_with_the_examples(name, run):
    code, out, err = run(f"{name} --help")
    examples = COMMANDS[name].examples
    assert code == 0 and err == ""
    assert out.endswith("\n  ".join(["examples:", *examples]) + "\n")
    assert len(examples) in (2, 3)
    assert all(example.startswith(f"hf-quantnoise {name} ") for example in examples)


# push talks to a Hub (test_push_command.py), finetune needs data (tests/examples/test_finetune.py)
@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("push", "finetune")])
def test_the_examples_run(name, work, run):
    if "plan.json" in " ".join(COMMANDS[name].examples):
        assert run("plan out/dense --save plan.json")[0] == 0
    for example in COMMANDS[name].examples:
        code, out, err = run(example)
        assert (code, out != "") == (0, True), err


def test_the_page_shows_the_examples():
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "command_line.md").read_text()
    for name in EVERY:
        assert f"## {name}\n" in page
        for example in COMMANDS[name].examples:
            assert example in page


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "COMMAND"),
        ("polish out/dense", "invalid choice: 'polish'"),
        ("plan", "PATH_OR_REPO"),
        ("plan out/dense --blocksize 8", "--blocksize 8 (hf-quantnoise plan --help"),
        ("plan out/dense --block_size large", "--block_size 'large' is no size"),
        ("plan out/dense --n_centroids 1", "n_centroids=1"),
        ("plan out/dense --scheme fixed_point --target_size_mb 1", "--target_size_mb"),
        ("plan out/dense --bits 8", "--bits is of --scheme fixed_point, and here are --scheme ipq"),
        ("plan out/dense --observer channel", "--observer is of --scheme fixed_point"),
        ("plan out/dense --scheme fixed_point --block_size 8", "--block_size is of --scheme ipq"),
        ("plan out/dense --scheme fixed_point --codebook_bits 8", "--codebook_bits 8; take one"),
        ("plan out/dense --config plan.json --bits 4", "take --bits out"),
        ("plan out/dense --config missing.json", "'missing.json' is no JSON file"),
        ("plan out/dense --config out/dense/config.json", "is no quantization config"),
        ("compress out/dense out/new --activation_bits 8", "calibration"),
        ("convert out/compressed out/new --to gguf", "'gguf'"),
        ("report out/dense --revision v1", "--revision 'v1' is of a repository"),
        ("plan out/dense --revision v1", "'out/dense' is a folder"),
        ("compress out/dense out/new --revision v1", "take it out"),
        ("convert out/compressed out/new --to dense --revision v1", "--revision 'v1'"),
        ("finetune audio", "'audio'"),
    ],
)
def test_usage_errors_are_one_line_and_code_2(line, said, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.count("\n") == 1
    assert said in err and "--help" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("report out/nothing", "out/nothing"),
        ("plan out/compressed", "convert out/compressed OUT --to dense"),
        ("plan out/dense --stages conv", "holds no layer of the model"),
        ("plan out/dense --block_size fnn=8", "'fnn' is no structure group"),
        ("plan out/dense --n_centroids ffn=9,embeddings=9,attention=9,haed=9", "mean 'head'"),
        ("plan out/dense --block_size .*query=8", "block_size={'.*query': 8}: the stage 'ffn'"),
        ("plan out/dense --target_size_mb 0.001", "target_size_mb=0.001"),
        ("compress out/dense out/compressed", "--overwrite"),
        ("compress out/dense out/dense --overwrite", "is the model itself"),
        ("compress out/dense out --overwrite", "holds no saved model"),
        ("compress out/dense out/dense/config.json/new", "'out/dense/config.json/new' cannot be"),
        ("convert out/compressed out/dense/config.json/new --to dense", "give another folder"),
        ("convert out/dense out/new --to dense", "is not quantized"),
        ("push out/dense me/x", "compress it first"),
        ("push nothing me/x", "is no folder"),
    ],
)
def test_failures_are_one_line_and_code_1(line, said, made, monkeypatch, run):
    monkeypatch.chdir(made)
    code, out, err = run(line)
    lines = [row for row in err.splitlines() if "error: " in row]
    assert code == 1 and out == "" and "Traceback" not in err
    assert len(lines) == 1 and said in lines[0] and lines[0] == err.splitlines()[-1]
    assert sorted(path.name for path in (made / "out").iterdir()) == ["compressed", "dense"]


def test_the_traceback_on_request(made, run):
    code, _, err = run(f"plan {made}/out/compressed --traceback")
    assert code == 1
    assert err.startswith("Traceback") and "require_dense" in err


def test_the_entry_points(monkeypatch, capsys):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["hf-quantnoise"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
    monkeypatch.setattr(sys, "argv", ["hf_quantnoise", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("hf_quantnoise", run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in EVERY)


def test_a_hub_that_is_not_reached_is_said_of_the_name(monkeypatch, run):
    class ConnectError(Exception):
        """Stands for that of whichever client the Hub's library uses: no OSError."""

    def fail(*args, **kwargs):
        raise ConnectError("name not known")

    monkeypatch.setattr("hf_quantnoise.cli.checkpoints.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hf_quantnoise.cli.headers.HfApi.get_safetensors_metadata", fail)
    code, _, err = run("report nowhere")
    assert code == 1 and "'nowhere' is no folder" in err and "name not known" in err
