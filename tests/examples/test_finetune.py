"""``hf-quantnoise finetune``: the runs of the examples."""

import json
import shutil

import pytest
from transformers import BertConfig

from hf_quantnoise import AutoQuantizedModel, CompressionArguments
from hf_quantnoise.cli import COMMANDS, main
from hf_quantnoise.runs.glue import parse


def test_examples_run(tiny_model, sentences, write, tmp_path, monkeypatch, capsys, metric_folder):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(metric_folder, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tiny_model, tmp_path / "out" / "dense")
    for name, seed in (("train", 1), ("dev", 2)):
        texts, labels = sentences(16, seed)
        write(f"{name}.csv", {"sentence": texts, "label": labels})
    to_parse, to_help, to_run = (ex.split()[1:] for ex in COMMANDS["finetune"].examples)
    with monkeypatch.context() as patch:  # the config is on the Hub
        patch.setattr("hf_quantnoise.runs.arguments.load_config", lambda *_, **__: BertConfig())
        assert parse(to_parse[2:]).flags.recipe == "13x"
    with pytest.raises(SystemExit) as stop:
        main(to_help)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert out.startswith("usage: hf-quantnoise finetune images") and "--image_column" in out
    assert "Same as --compress False." in out, "the help of --no_compress"
    assert main(to_run) == 0
    assert "times smaller" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["reloaded"]["logits_bit_equal"] is True
    assert results["noise"]["noise"] == "int4"
    AutoQuantizedModel.from_pretrained(tmp_path / "run" / "compressed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bitts", "4"], "--bitts 4; did you mean '--bits'?"),
        (["--scheme", "pq"], "--scheme"),
        (["--bits", "four"], "--bits"),
        ([], "--model_name_or_path"),
        (["--noise_rate", "1.5"], "--noise_rate 1.5"),
        (["--block_size", "x"], "invalid --block_size 'x'"),
        (["--layer_quantizers", "missing.json"], "invalid --layer_quantizers 'missing.json'"),
        (["--stage_epochs", "-1"], "--stage_epochs -1"),
        (["--bits", "4"], "--bits 4 requires --scheme fixed_point"),
        (["--sentence2_key", "b"], "--sentence2_key 'b' requires --sentence1_key"),
        (["--sentence1_key", "label"], "--sentence1_key 'label': it is the --label_column"),
    ],
)
def test_invalid_flags_are_usage_errors(flags, words, tmp_path, capsys):
    given = ["--model_name_or_path", "x", "--output_dir", str(tmp_path)] if flags else []
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "glue", *given, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    assert words in err and "hf-quantnoise finetune glue --help" in err


def test_missing_packages_are_named_with_the_extra(monkeypatch, capsys):
    def without_datasets(*args):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr("hf_quantnoise.cli.tasks.import_module", without_datasets)
    assert main(["finetune", "glue", "--help"]) == 1
    assert "requires datasets; run pip install 'hf-quantnoise[examples]'" in capsys.readouterr().err


def test_removed_flags_have_no_effect(tmp_path, caplog):
    words = ["--model_name_or_path", "m", "--output_dir", str(tmp_path)]
    removed = ["--reassign_steps", "4", "--stage-schedule=continue", "--distill_cache"]
    args = parse([*words, *removed, "--stage_epochs", "2"])
    assert args.compression == CompressionArguments(stage_epochs=2)
    for name in ("--reassign_steps", "--stage-schedule", "--distill_cache"):
        assert f"{name} was removed and has no effect" in caplog.text


def test_flags_in_a_json_file(tmp_path, caplog):
    path = tmp_path / "flags.json"
    flags = {
        "model_name_or_path": "m",
        "output_dir": str(tmp_path),
        "noise": ["int8"],
        "seed": 3,
        "block_size": {"ffn": 8, "embeddings": 8, "attention": 4},
        "distill_cache_mb": 64,
    }
    path.write_text(json.dumps(flags))
    args = parse([str(path)])
    assert args.noise.noise == "int8" and args.noise.seed == args.quantization.seed == 3
    assert args.quantization.block_size == flags["block_size"]
    assert "distill_cache_mb was removed and has no effect" in caplog.text
    path.write_text(json.dumps({**flags, "blok_size": 4}))
    with pytest.raises(ValueError, match=r"unknown field 'blok_size'.*did you mean 'block_size'"):
        parse([str(path)])
    path.write_text("{")
    with pytest.raises(ValueError, match=r"flags.json"):
        parse([str(path)])


@pytest.fixture
def parse_file(tmp_path):
    """Parse a JSON file with these flags."""

    def parse_file(**flags):
        path = tmp_path / "flags.json"
        path.write_text(json.dumps({"model_name_or_path": "m", "task_name": "sst2", **flags}))
        return parse([str(path)])

    return parse_file


def test_values_of_a_json_file_are_read_as_flags(parse_file):
    words = {"compress": "false", "seed": "7", "learning_rate": "5e-5", "max_steps": 1e3}
    args = parse_file(**words, noise="none", noise_rate=0.5, max_train_samples=None, plots=None)
    assert args.flags.compress is False and args.compression.plots is True
    training = args.training
    assert (training.seed, training.learning_rate, training.max_steps) == (7, 5e-5, 1000)
    assert args.noise is None and args.data.max_train_samples is None
    assert parse_file(include_num_input_tokens_seen="all").training.include_num_input_tokens_seen
    assert parse_file(noise=["pq", "int8"], noise_rate=[0.1, "0.2"]).noise.p == [0.1, 0.2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"compress": "maybe"}, 'invalid compress in .*got "maybe", expected true or false'),
        ({"max_train_samples": 10.5}, "max_train_samples .*got 10.5, expected an integer"),
        ({"max_train_samples": True}, "max_train_samples .*got true, expected an integer"),
        ({"learning_rate": "high"}, 'learning_rate .*got "high", expected a number'),
        ({"noise_rate": [0.1, [0.2]]}, "noise_rate .*expected a number"),
        ({"scheme": "pq"}, 'scheme .*got "pq", expected one of ipq, fixed_point'),
        ({"dtype": "float64"}, "dtype .*expected one of float32, bfloat16"),
        ({"recipe": ["13x"]}, "recipe .*expected one of 13x, 20x, 30x"),
        ({"model_name_or_path": None}, "missing model_name_or_path in .*flags.json"),
    ],
)
def test_invalid_values_of_a_json_file_are_named(flags, words, parse_file):
    with pytest.raises(ValueError, match=words):
        parse_file(**flags)


def test_json_file_with_other_flags_is_refused():
    with pytest.raises(ValueError, match=r"flags.json is a file of flags.*\(--seed 1\); add them"):
        parse(["flags.json", "--seed", "1"])
