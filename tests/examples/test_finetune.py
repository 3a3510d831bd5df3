"""``hf-quantnoise finetune``: the runs of the examples by another name."""

import json
import shutil

import pytest

from hf_quantnoise import AutoQuantizedModel
from hf_quantnoise.cli import COMMANDS, main


def test_the_examples_run(tiny_model, sentences, write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "out" / "dense")
    for name, seed in (("train", 1), ("dev", 2)):
        texts, labels = sentences(16, seed)
        write(f"{name}.csv", {"sentence": texts, "label": labels})
    to_help, to_run = (example.split()[1:] for example in COMMANDS["finetune"].examples)
    with pytest.raises(SystemExit) as stop:
        main(to_help)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert out.startswith("usage: hf-quantnoise finetune images") and "--image_column" in out
    assert main(to_run) == 0
    assert "times smaller" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["reloaded"]["logits_bit_equal"] is True
    assert results["noise"]["noise"] == "int4"
    AutoQuantizedModel.from_pretrained(tmp_path / "run" / "compressed")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bitts", "4"], "--bitts"),
        (["--scheme", "pq"], "--scheme"),
        (["--bits", "four"], "--bits"),
        ([], "--model_name_or_path"),
    ],
)
def test_flags_that_are_none_are_usage_errors(flags, said, tmp_path, capsys):
    given = ["--model_name_or_path", "x", "--output_dir", str(tmp_path)] if flags else []
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "glue", *given, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    assert said in err and "hf-quantnoise finetune glue --help" in err


def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    def without_datasets(*args):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr("hf_quantnoise.cli.finetune.import_module", without_datasets)
    assert main(["finetune", "glue", "--help"]) == 1
    assert "needs datasets: pip install 'hf-quantnoise[examples]'" in capsys.readouterr().err
