"""Flags of ``run_glue.py``: their forms, and errors that name them."""

import json
import re

import pytest

from hf_quantnoise.configuration.flags import parse_int_or_dict, parse_patterns
from hf_quantnoise.runs.glue import parse

pytest.importorskip("hf_quantnoise")


@pytest.mark.parametrize(
    ("flags", "train", "evaluate"),
    [
        ([], True, True),
        (["--do_train"], True, False),
        (["--do_eval"], False, True),
        (["--do_train", "--do_eval"], True, True),
        (["--do_train", "False"], False, True),
        (["--do_eval", "False"], True, False),
        (["--do_train", "--eval_strategy", "epoch"], True, True),
    ],
)
def test_do_train_and_do_eval(flags, train, evaluate, tmp_path):
    out = ["--output_dir", str(tmp_path), "--model_name_or_path", "m"]
    training = parse([*out, *flags]).training
    assert (training.do_train, training.do_eval) == (train, evaluate)


def test_secrets_are_not_written(tmp_path):
    words = f"--model_name_or_path m --output_dir {tmp_path} --token abc --hub_token def".split()
    arguments = parse([*words[:-2], "--hub_token=def"])
    assert arguments.command[-3:] == ["--token", "<TOKEN>", "--hub_token=<TOKEN>"]
    written = json.dumps(arguments.to_dict())
    assert '"abc"' not in written and '"def"' not in written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ('{"ffn": 8, "attention": 4}', {"ffn": 8, "attention": 4}),
        ("ffn=8, embeddings=8,attention=4", {"ffn": 8, "embeddings": 8, "attention": 4}),
        (r".*\.query=4", {r".*\.query": 4}),
    ],
)
def test_block_sizes_in_three_forms(text, value):
    assert parse_int_or_dict("block_size", text) == value


@pytest.mark.parametrize("text", ["eight", "8.5", "ffn=8,4", "ffn=x", "[8]", "true", ""])
def test_invalid_block_sizes(text):
    with pytest.raises(ValueError, match=rf"--block_size '{re.escape(text)}'"):
        parse_int_or_dict("block_size", text)


def test_patterns_in_two_forms():
    assert parse_patterns("flag", None) is None
    assert parse_patterns("flag", r"[a-z]+\.query") == r"[a-z]+\.query"
    assert parse_patterns("flag", '["query", "key"]') == ["query", "key"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise_rate", "1.5"], r"--noise_rate 1\.5"),
        (["--noise", "prxy"], r"--noise 'prxy'.*did you mean 'proxy'"),
        (["--noise", "prxy", "--do_train", "False"], r"--noise 'prxy'"),
        (["--block_size", "0"], r"--block_size 0"),
        (["--stages", "ffm", "--block_size", "4"], r"stages.*'ffm'"),
        (["--noise_block_size", "5"], r"block_size=5"),
        (["--block_size", "5", "--noise", "none"], r"block_size=5"),
        (["--noise_target_modules", "nothing"], r"target_modules='nothing'"),
        (["--target_size_mb", "0.001"], r"target_size_mb=0\.001.*1,000 bytes"),
        (
            ["--target_size_mb", "1", "--target_bits_per_weight", "1"],
            r"target_size_mb=1.*target_bits_per_weight=1",
        ),
        (
            ["--target_bits_per_weight", "4", "--scheme", "fixed_point"],
            r"--target_bits_per_weight 4.0 requires --scheme ipq",
        ),
        (["--layer_quantizers", "missing.json"], r"--layer_quantizers 'missing\.json'"),
        (["--codebook_bits", "7"], r"--codebook_bits 7"),
        (["--stage_epochs", "-1"], r"--stage_epochs -1"),
        (
            ["--do_train", "False", "--train_file", ""],
            r"--stage_epochs 1\.0.*--train_file",
        ),
        (
            ["--model_name_or_path", "./absent"],
            r"--model_name_or_path '\./absent'",
        ),
        (["--no_such_flag"], r"--no_such_flag"),
    ],
)
def test_invalid_flags_are_named(flags, message, start, write_sets):
    with pytest.raises(ValueError, match=message):
        start(*write_sets(), "--n_centroids", "8", "--num_train_epochs", "0.1", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block_size", "5"], "block_size=5"),
        (["--stage_settings", '{"fnn": {"steps": 2}}'], "stage_settings.*'fnn'"),
        (["--keep_noise"], "keep_noise=True"),
        (["--teacher_name_or_path", "./absent"], "--teacher_name_or_path './absent'"),
    ],
)
def test_impossible_compression_is_reported_before_training(
    flags, message, start, write_sets, monkeypatch
):
    def train(*args, **kwargs):
        raise AssertionError("the model was trained")

    monkeypatch.setattr("hf_quantnoise.runs.compression_run.QuantNoiseTrainer.train", train)
    with pytest.raises(ValueError, match=message):
        start(*write_sets(), "--n_centroids", "8", "--noise", "none", *flags)
