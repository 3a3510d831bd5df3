"""Example scripts: errors of one line, like those of the commands, and ``--log_level error``."""

import importlib
import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import transformers

from hf_quantnoise.runs.example_data import read_table

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = ("run_glue", "run_clm", "run_image_classification")


@pytest.fixture
def start(monkeypatch, capsys, tmp_path):
    """Run a script as a program; return exit code, stdout and stderr."""

    def start(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return start


FAILURE = ("--model_name_or_path", "none", "--validation_file", "none.csv", "--output_dir", "out")


@pytest.mark.parametrize("name", RUNS)
def test_failures_of_runs_are_one_line(name, start):
    code, out, err = start(name, *FAILURE, "--do_train", "False", "--stage_epochs", "0")
    assert (code, err.count("\n")) == (1, 1) and "Traceback" not in out + err
    assert err.startswith(f"{name}.py: error: invalid --")
    code, _, err = start(name, *FAILURE, "--do_eval", "--stage_epochs", "0", "--traceback")
    assert code == 1 and err.startswith("Traceback")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stage_epoch_s", "1"], "did you mean '--stage_epochs'?"),
        (["--recipe", "14x"], "did you mean '13x'?"),
        (["--noise_rate", "2"], "--noise_rate 2"),
    ],
)
def test_invalid_flags_of_runs_are_usage_errors(name, flags, words, start):
    code, _, err = start(name, *FAILURE, *flags)
    assert (code, err.count("\n")) == (2, 1) and words in err
    assert f"({name}.py --help lists all flags)" in err


@pytest.mark.parametrize(
    ("name", "package"),
    [("sft_with_noise", "trl"), ("sentence_transformer_with_noise", "sentence_transformers")],
)
def test_errors_of_trainer_examples_are_one_line(name, package, start):
    pytest.importorskip(package)
    words = ["--model_name_or_path", "none", "--output_dir", "out"]
    code, _, err = start(name, *words, "--train_file", "none.csv")
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"{name}.py: error: ")
    code, _, err = start(name, *words, "--observr", "x")
    assert (code, err.count("\n")) == (2, 1) and "did you mean '--observer'?" in err


@pytest.fixture
def restored_logging():
    """Undo what a run sets for the process."""
    handlers, logger = list(logging.root.handlers), logging.getLogger("hf_quantnoise")
    level = logger.level
    yield
    logging.root.handlers[:] = handlers
    logger.setLevel(level)
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()
    datasets.logging.set_verbosity_warning()
    datasets.enable_progress_bars()


@pytest.mark.usefixtures("restored_logging")
def test_run_glue_prints_the_closing_table_alone_at_log_level_error(
    start, tiny_model, glue_files, tmp_path
):
    words = ["--model_name_or_path", tiny_model, "--output_dir", "out", *glue_files(tmp_path)]
    words += ["--metrics", "sklearn", "--n_centroids", "8", "--stage_epochs", "0.5", "--use_cpu"]
    words += ["--num_train_epochs", "1", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    code, out, err = start("run_glue", *words, "--log_level", "error")
    assert (code, err) == (0, "")
    head, line, *rows = out.strip().splitlines()
    assert head.startswith("model ") and set(line) == {"-"}
    assert [row.partition(",")[0] for row in rows] == ["finetuned", "compressed"]
    assert (tmp_path / "out" / "plots" / "stages.png").is_file()


@pytest.mark.parametrize("path", ["dev.csv", "folder.csv"])
def test_data_files_that_do_not_exist_or_are_folders_are_errors(path, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    reason = "no such file" if path == "dev.csv" else "it is a folder"
    with pytest.raises(FileNotFoundError, match=f"{path}': {reason}; pass a .parquet, .csv"):
        read_table("validation_file", str(tmp_path / path))


@pytest.mark.parametrize("task", ["clm", "images"])
def test_datasets_are_loaded_with_the_token(task, monkeypatch, tmp_path):
    module = importlib.import_module(f"hf_quantnoise.runs.{task}")
    asked = []

    def load_dataset(*names, token=None, **kwargs):
        asked.append(token)
        raise ConnectionError

    monkeypatch.setattr("hf_quantnoise.runs.example_data.load_dataset", load_dataset)
    args = module.parse(
        ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--dataset_name", "me/private",
         "--token", "secret", "--noise", "none"]
    )  # fmt: skip
    monkeypatch.setattr(args.model, "load_config", lambda: None)
    monkeypatch.setattr(args.model, "load_tokenizer", lambda: None)
    monkeypatch.setattr(args.model, "load_model", lambda *args: SimpleNamespace(config=None))
    monkeypatch.setattr(f"{module.__name__}.position_limit", lambda model: None, raising=False)
    with pytest.raises(ConnectionError):
        module.prepare(args)
    assert asked == ["secret"]
