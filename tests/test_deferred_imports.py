"""Imports are deferred: no torch in `--help`, no trainer in a report; the format is registered."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_quantnoise
from hf_quantnoise import compression
from hf_quantnoise.deferred_imports import call_after_import

GOLDEN = Path(__file__).parent / "golden" / "ipq"
SHOW_MODULES = "import json, sys; print(json.dumps(list(sys.modules)), file=sys.stderr)"
TRAINER = {
    "transformers.trainer",
    "transformers.training_args",
    "transformers.trainer_callback",
    "datasets",
    "hf_quantnoise.trainer",
    "hf_quantnoise.compression.stages",
}


def run(code: str) -> subprocess.CompletedProcess:
    """Run Python code in a new process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def modules_after(code: str) -> set[str]:
    """Return the names of the modules that a process has imported after some code."""
    done = run(f"{code}\n{SHOW_MODULES}")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def command(line: str) -> str:
    """Return code that runs a command line."""
    return (
        "from hf_quantnoise.cli import main\n"
        f"try: assert main({line.split()!r}) == 0\n"
        "except SystemExit as stop: assert stop.code == 0"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import hf_quantnoise",
        *map(
            command, ("--help", "--version", "report --help", "compress --help", "eval glue --help")
        ),
    ],
)
def test_package_and_help_import_neither_torch_nor_transformers(code):
    assert modules_after(code).isdisjoint({"torch", "transformers", "numpy"})


@pytest.mark.parametrize(
    "line",
    [
        "compress dense small --unknown x",
        "compress dense",
        "plan dense --scheme best",
        "eval glue dense",
        "eval clm dense small --unknown x",
        "finetune glue --unknown x",
        "finetune audio",
        "convert packed out --to best",
        "report",
    ],
)
def test_usage_errors_import_neither_torch_nor_transformers(line):
    code = (
        "from hf_quantnoise.cli import main\n"
        f"try: main({line.split()!r})\n"
        "except SystemExit as stop: assert stop.code == 2"
    )
    assert modules_after(code).isdisjoint({"torch", "transformers", "numpy", "datasets"})


def test_report_does_not_import_the_trainer():
    assert modules_after(command(f"report {GOLDEN}")).isdisjoint(TRAINER)


def test_plan_does_not_import_the_trainer(tmp_path):
    config = json.loads((GOLDEN / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = f"plan {tmp_path} --scheme fixed_point"
    assert modules_after(command(line)).isdisjoint(TRAINER)


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_quantnoise, transformers",
        "import transformers.quantizers, hf_quantnoise",
        # It imports transformers.quantizers before it is complete itself.
        "import hf_quantnoise; from transformers.generation.utils import GenerationMixin",
    ],
)
def test_format_is_registered_whatever_is_imported_first(imports):
    load = (
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(GOLDEN)!r})\n"
        "print(type(model.hf_quantizer).__name__, len(model.config.quantization_config.plan))"
    )
    done = run(f"{imports}\n{load}")
    name, layers = done.stdout.split()
    assert name == "QuantNoiseHfQuantizer" and int(layers) > 0, done.stderr


def test_quantization_config_loads_without_a_model():
    done = run(
        "import hf_quantnoise\n"
        "from transformers.quantizers import AutoQuantizationConfig\n"
        f"print(AutoQuantizationConfig.from_pretrained({str(GOLDEN)!r}).to_dict())"
    )
    config = json.loads((GOLDEN / "config.json").read_text())["quantization_config"]
    shown = ast.literal_eval(done.stdout)
    assert shown["plan"] == config["plan"], done.stderr


@pytest.mark.parametrize("package", [hf_quantnoise, compression], ids=lambda each: each.__name__)
def test_lazy_names_are_those_that_type_checkers_see(package):
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    for_checkers = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (call,) = (node for node in ast.walk(block.orelse[0]) if isinstance(node, ast.Call))
    at_run_time = {
        name: module for module, names in ast.literal_eval(call.args[1]).items() for name in names
    }
    deprecated = {keyword.arg: keyword.value.value for keyword in call.keywords}
    assert at_run_time | deprecated == for_checkers
    for name, module in for_checkers.items():
        found = getattr(package, name)
        assert found is getattr(importlib.import_module(f"{package.__name__}.{module}"), name)
    assert {*package.__all__, *at_run_time} <= {*dir(package)}
    assert {*package.__all__} - {"__version__"} == at_run_time.keys()


def test_unknown_name_raises():
    with pytest.raises(AttributeError, match="'hf_quantnoise' has no attribute 'QuantNoise'"):
        _ = hf_quantnoise.QuantNoise


def test_star_import_gives_all_names():
    names: dict = {}
    exec("from hf_quantnoise import *", names)
    assert {*hf_quantnoise.__all__} <= names.keys()


def test_call_after_import(tmp_path, monkeypatch):
    module = tmp_path / "imported_later.py"
    module.write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list = []
    call_after_import("imported_later", lambda module: seen.append(module.value))
    with pytest.raises(RuntimeError):
        importlib.import_module("imported_later")
    module.write_text("value = 1  # after an import that failed")
    assert not seen
    importlib.import_module("imported_later")
    call_after_import("imported_later", lambda module: seen.append(module.value))
    assert seen == [1, 1]
