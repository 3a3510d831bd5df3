"""All commands: help, examples, exit codes, errors on one line."""

import importlib
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hf_quantnoise.cli import COMMANDS, build_parser, main

NAMES = list(COMMANDS)
# Arguments that a command needs, other than two words.
WORDS = {
    "completion": ["bash"], "convert": ["a", "b", "--to", "dense"], "report": ["a"],
    "plan": ["a"], "finetune": ["glue"], "eval": ["glue"],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_with_the_examples(name, run):
    code, out, err = run(f"{name} --help")
    examples = COMMANDS[name].examples
    assert code == 0 and err == ""
    assert out.endswith("\n  ".join(["examples:", *examples]) + "\n")
    assert len(examples) in (2, 3)
    assert all(example.startswith(f"hf-quantnoise {name} ") for example in examples)


# push needs a Hub (test_push_command.py), finetune and eval need data (tests/examples)
@pytest.mark.parametrize("name", sorted({*NAMES} - {"push", "finetune", "eval"}))
def test_examples_run(name, work, run):
    if name == "completion":
        pytest.importorskip("shtab")
    if "plan.json" in " ".join(COMMANDS[name].examples):
        assert run("plan out/dense --save plan.json")[0] == 0
    for example in COMMANDS[name].examples:
        code, out, err = run(example)
        assert (code, out != "") == (0, True), err


def test_docs_show_the_examples():
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "command_line.md").read_text()
    for name in NAMES:
        assert f"## {name}\n" in page
        for example in COMMANDS[name].examples:
            assert example in page


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "COMMAND"),
        ("polish out/dense", "invalid choice: 'polish'"),
        ("plan", "PATH_OR_REPO"),
        ("plan out/dense --blocksize 8", "--blocksize 8; did you mean '--block_size'?"),
        ("compress --recipe 30x", "--recipe is a flag of `hf-quantnoise finetune`"),
        ("plan out/dense --recipe=30x", "since a recipe trains the model"),
        ("plan out/dense --block_size large", "invalid --block_size 'large'"),
        ("plan out/dense --n_centroids 1", "--n_centroids 1"),
        ("plan out/dense --scheme fixed_point --target_size_mb 1", "--target_size_mb"),
        ("plan out/dense --bits 8", "--bits 8 requires --scheme fixed_point"),
        ("plan out/dense --observer channel", "--observer channel requires"),
        (
            "plan out/dense --scheme fixed_point --block_size 8",
            "--block_size 8 requires --scheme ipq",
        ),
        ("plan out/dense --scheme fixed_point --codebook_bits 8", "--codebook_bits 8 requires"),
        ("plan out/dense --config plan.json --bits 4", "--bits cannot be combined with --config"),
        ("plan out/dense --config missing.json", "invalid --config 'missing.json'"),
        (
            "plan out/dense --config out/dense/config.json",
            "invalid --config 'out/dense/config.json'",
        ),
        ("compress out/dense out/new --activation_bits 8", "--activation_bits 8 needs"),
        ("convert out/compressed out/new --to gguf", "'gguf'"),
        ("report out/dense --revision v1", "--revision 'v1' requires a repository"),
        ("plan out/dense --revision v1", "'out/dense' is a folder"),
        ("compress out/dense out/new --revision v1", "--revision 'v1'"),
        ("convert out/compressed out/new --to dense --revision v1", "--revision 'v1'"),
        ("finetune audio", "'audio'"),
        ("reprt out/dense", "did you mean 'report'? (hf-quantnoise --help lists all commands"),
        ("report --perr layer", "(hf-quantnoise report --help lists all flags)"),
        ("report out/dense --per layr", "did you mean 'layer'?"),
        ("convert out/compressed out/new --to onxn", "did you mean 'onnx'?"),
        ("finetune glu", "did you mean 'glue'?"),
        ("--verson", "did you mean '--version'?"),
        ("convert out/compressed out/new --too=dense", "did you mean '--to'?"),
    ],
)
def test_usage_errors_are_one_line_with_exit_code_2(line, words, made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.count("\n") == 1
    assert words in err and "--help" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("report out/nothing", "no folder 'out/nothing', and no repository of this name with"),
        ("compress out/nothing x", "no folder 'out/nothing', and no repository of this name with"),
        ("convert sst2_smal out/new --to dense", "no folder 'sst2_smal', and no repository"),
        ("report out", "no *.safetensors file; pass the folder of a saved model"),
        ("plan out", "'out' has no config.json; pass the folder of a saved model"),
        ("report out/a/b", "no folder 'out/a/b', and not a valid name of a repository"),
        ("plan out/compressed", "convert out/compressed OUT --to dense"),
        ("plan out/dense --stages conv", "'conv'"),
        ("plan out/dense --block_size fnn=8", "'fnn'"),
        ("plan out/dense --n_centroids ffn=9,embeddings=9,attention=9,haed=9", "'haed'"),
        ("plan out/dense --stages ffn --block_size .*query=8", "block_size={'.*query': 8}"),
        ("plan out/dense --target_size_mb 0.001", "target_size_mb=0.001"),
        ("compress out/dense out/compressed", "--overwrite"),
        ("compress out/dense out/dense --overwrite", "is the model itself"),
        ("compress out/dense out --overwrite", "--overwrite does not delete"),
        (
            "compress out/dense out/dense/config.json/new",
            "'out/dense/config.json/new' cannot be written",
        ),
        ("convert out/compressed out/dense/config.json/new --to dense", "choose another"),
        (
            "convert out/dense out/new --to dense",
            "compress it first: hf-quantnoise compress out/dense OUT",
        ),
        ("push out/dense me/x", "compress it first: hf-quantnoise compress out/dense OUT"),
        ("push nothing me/x", "invalid FOLDER 'nothing'"),
    ],
)
def test_failures_are_one_line_with_exit_code_1(line, words, made, monkeypatch, run):
    monkeypatch.chdir(made)
    code, out, err = run(line)
    lines = [row for row in err.splitlines() if "error: " in row]
    assert code == 1 and out == "" and "Traceback" not in err and ".;" not in err
    assert len(lines) == 1 and words in lines[0] and lines[0] == err.splitlines()[-1]
    assert sorted(path.name for path in (made / "out").iterdir()) == ["compressed", "dense"]


def test_report_and_plan_have_the_same_rows_by_default(work, run):
    for line in ("report out/compressed", "plan out/dense"):
        _, default, _ = run(line)
        assert default == run(f"{line} --per group")[1] != run(f"{line} --per layer")[1]


def test_interruption_is_one_line(work, run, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["report"], "run", interrupt)
    assert run("report out/dense") == (130, "", "\nhf-quantnoise report: interrupted\n")


def test_traceback_flag(made, run):
    code, _, err = run(f"plan {made}/out/compressed --traceback")
    assert code == 1
    assert err.startswith("Traceback") and "require_dense" in err


def test_entry_points(monkeypatch, capsys):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["hf-quantnoise"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
    monkeypatch.setattr(sys, "argv", ["hf_quantnoise", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("hf_quantnoise", run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {name}\s", shown, re.MULTILINE) for name in NAMES)


def test_unreachable_hub_errors_name_the_model(monkeypatch, run):
    class ConnectError(Exception):
        """Like the error of an HTTP client: not an OSError."""

    def fail(*args, **kwargs):
        raise ConnectError("name not known")

    monkeypatch.setattr("hf_quantnoise.cli.checkpoints.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hf_quantnoise.cli.headers.HfApi.get_safetensors_metadata", fail)
    code, _, err = run("report nowhere")
    assert code == 1 and "no folder 'nowhere'" in err and "name not known" in err


def test_closed_pipes_end_a_command_silently(made):
    line = [sys.executable, "-m", "hf_quantnoise", "report", str(made / "out" / "dense")]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_other_broken_pipes_are_errors(run, monkeypatch):
    def fail(args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(COMMANDS["report"], "run", fail)
    code, _, err = run("report out/dense")
    assert code == 1 and "error: [Errno 32] Broken pipe" in err


@pytest.mark.parametrize("name", NAMES)
def test_flags_of_several_words_have_a_form_with_dashes(name):
    args = build_parser([name]).parse_known_args([name, *WORDS.get(name, ["a", "b"])])[0]
    known = args.parser._option_string_actions
    assert {flag.replace("_", "-") for flag in known if flag.startswith("--")} <= known.keys()
