"""``hf-quantnoise completion``: the script, in a real shell."""

import shutil
import subprocess
import sys

import pytest

from hf_quantnoise.cli import COMMANDS

# Completes the words that it gets as a shell does after a tab, and prints the candidates.
TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_hf_quantnoise
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script for bash, in a file."""
    pytest.importorskip("shtab")
    pytest.importorskip("datasets")
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    path = tmp_path_factory.mktemp("completion") / "hf-quantnoise"
    words = [sys.executable, "-m", "hf_quantnoise", "completion", "bash"]
    path.write_text(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fin"], {"finetune"}),
        ([""], {*COMMANDS}),
        (["report", "out", "--js"], {"--json"}),
        (["report", "out", "--per", ""], {"group", "layer"}),
        (["convert", "in", "out", "--to", "o"], {"onnx", "onnx_int8"}),
        (["compress", "in", "out", "--frequent"], {"--frequent_rows", "--frequent-rows"}),
        (["finetune", ""], {"glue", "clm", "images"}),
        (["finetune", "glue", "--task_n"], {"--task_name"}),
        (["finetune", "clm", "--recipe", "2"], {"20x"}),
        (["eval", "images", "--image_c"], {"--image_column"}),
        (["report", "dense mod"], {"dense model"}),
        (["compress", "in", "out", "--config", "pl"], {"plan.json"}),
    ],
)
def test_bash_completes(words, expected, script, tmp_path):
    (tmp_path / "dense model").mkdir()
    (tmp_path / "plan.json").write_text("{}")
    call = ["bash", "-c", TAB, "bash", str(script), "hf-quantnoise", *words]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
    found = {word.strip() for word in done.stdout.splitlines()}
    assert found - {"-h", "--help"} == expected, done.stderr


def test_without_shtab_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = run("completion bash")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "pip install 'hf-quantnoise[completion]'" in err


def test_unknown_shells_are_a_usage_error(run):
    code, _, err = run("completion bsh")
    assert code == 2 and "did you mean 'bash'?" in err
