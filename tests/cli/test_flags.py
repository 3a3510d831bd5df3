"""``flags.json`` has the flags that the dataclasses define, and is read without them."""

import dataclasses
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_quantnoise.argument_parsing import UsageError
from hf_quantnoise.cli import build_parser, flags
from hf_quantnoise.cli.tasks import TASKS, task_module
from hf_quantnoise.configuration.flags import QuantizationFlags
from hf_quantnoise.configuration.options import options_of

WRITER = Path(__file__).parents[2] / "docs" / "write_flags.py"
MODEL = ["--model_name_or_path", "m"]


def test_file_is_up_to_date():
    pytest.importorskip("datasets")
    assert flags.stored() == runpy.run_path(str(WRITER))["content"](), (
        "run python docs/write_flags.py"
    )


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--scheme fixed_point --bits 4 --observer channel --exclude-modules lm_head",
        "--block_size ffn=8 --stages ffn .* --row_scale --codebook-bits 8 --target_size_mb 1.5",
        "--row_scale False --activation_bits 8 --frequent_rows 0.5 --rare_block_size 16",
    ],
)
def test_stored_flags_parse_as_those_of_the_dataclass(line):
    words = line.split()
    (expected,) = HfArgumentParser([QuantizationFlags]).parse_args_into_dataclasses(words)
    args = build_parser(["plan"]).parse_args(["plan", "dense", *words])
    assert {name: getattr(args, name) for name in options_of(QuantizationFlags)} == vars(expected)


def test_training_flags_are_the_fields_of_transformers():
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    assert flags.training_flags() == names


@pytest.mark.parametrize("task", TASKS)
def test_every_flag_of_finetune_is_known(task):
    pytest.importorskip("datasets")
    parser = task_module(task, "finetune").example.parser()
    flags.check_names(task, [*parser._option_string_actions, "--learning_r=1", "-1", "-"])
    flags.check_names(task, ["--", "--recpie"])
    flags.check_names(task, [f"--{name}" for name in parser.elsewhere])  # explained by the parser
    flags.check_names(task, ["flags.json"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recpie", "13x", *MODEL], "--recpie 13x; did you mean '--recipe'?"),
        ([*MODEL, "--learning_rat3=1"], "--learning_rat3=1; did you mean '--learning_rate'?"),
        ([*MODEL, "--lr-rate", "1", "--xyzzy"], "--lr-rate 1 --xyzzy; did you"),
    ],
)
def test_unknown_flags_of_finetune(words, message):
    with pytest.raises(UsageError) as caught:
        flags.check_names("glue", words)
    assert message in f"{caught.value}; did you"


def test_flags_of_an_unreadable_trainer_are_left_to_its_parser(tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    flags.check_names("glue", ["--recpie"])
    spec = ModuleSpec("transformers", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(flags, "find_spec", lambda name: spec)
    (tmp_path / "training_args.py").write_text("TrainingArguments = make()")
    assert flags.training_flags() == []
    flags.check_names("glue", ["--recpie"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("eval glue", "the following arguments are required: DENSE, COMPRESSED"),
        ("eval glue a b --batchsize 2", "--batchsize 2; did you mean '--batch_size'?"),
        ("eval glue a b --optimize int4", "did you mean 'int8'?"),
        ("eval glue a b --batch_size two", "--batch_size/--batch-size: invalid int value: 'two'"),
        ("compress a b --scheme ipk", "did you mean 'ipq'?"),
        ("compress a b --row_scale perhaps", "invalid boolean value: 'perhaps'"),
    ],
)
def test_usage_errors_of_stored_flags(line, message, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_quantnoise.runs.evaluation", None)  # cannot be imported
    code, out, err = run(line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err and "--help lists all flags)" in err


def test_help_of_eval_lists_the_flags_of_its_task(run):
    code, out, _ = run("eval images --help")
    assert code == 0
    assert all(text in out for text in ("DENSE", "--image_column", "(default: 8)", "examples:"))
