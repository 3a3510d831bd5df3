"""run_clm.py on a tiny model, from the command line to the closing table, and its errors."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_quantnoise.runs.clm import TextArguments, main, read_text, split_into_examples

TWO_STAGES = ["--stages", "ffn", "embeddings"]
BITS_16 = ["--codebook_bits", "16"]


def flags(text_checkpoint, texts, tmp_path, *more):
    return [
        *("--model_name_or_path", str(text_checkpoint), "--train_file", str(texts["train"])),
        *("--validation_file", str(texts["validation"]), "--output_dir", str(tmp_path / "out")),
        *("--sequence_length", "16", "--num_train_epochs", "1", "--save_strategy", "no"),
        *("--per_device_train_batch_size", "16", "--n_centroids", "8", "--stage_epochs", "0.5"),
        *("--learning_rate", "1e-3", "--disable_tqdm", "True", "--plots", "False", *more),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ["--noise", "proxy", "--noise_schedule", "3", "--layerdrop", "0.2"],
        ["--noise", "pq", "int8", "--codebook_bits", "8", "--activation_bits", "8", *TWO_STAGES],
        ["--noise", "int4", "--scheme", "fixed_point", "--bits", "4", "--observer", "channel"],
        ["--noise", "mean", "--noise_block_selection", "cluster", *TWO_STAGES, *BITS_16],
        ["--noise", "int8", "--noise_observer", "histogram", "--share_layers", "2", *TWO_STAGES],
        ["--noise", "none", "--scheme", "fixed_point", "--prune_layers", "every_other"],
    ],
)
def test_run_clm_finetunes_compresses_and_reloads(
    text_checkpoint, texts, tmp_path, settings, capsys
):
    values = main(flags(text_checkpoint, texts, tmp_path, *settings))
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["reloaded"]["logits_bit_equal"] is True
    for part in ("dense", "reloaded"):
        metrics = stored[part]["metrics"]
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
        # One token per word, and an end of line after each twelve.
        ratio = math.log(metrics["word_perplexity"]) / metrics["loss"]
        assert ratio == pytest.approx(12 / 13, rel=1e-3)
    assert stored["compressed"]["bytes"] < stored["dense"]["bytes"]
    assert "perplexity" in capsys.readouterr().out
    assert values["examples"] == {"train": 45, "validation": 15}
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "compressed")
    assert small.is_quantized


def test_examples_are_the_stream_without_gaps(text_checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(text_checkpoint)
    lines = [" ".join(f"w{word}" for word in range(i, i + 5)) + "\n" for i in range(0, 20, 5)]
    text = split_into_examples(lines, tokenizer, 6, None, "--train_file")
    assert [row for rows in text.rows["input_ids"] for row in rows] == list(range(3, 21))
    assert text.tokens == 3 * 5
    assert text.words == pytest.approx(24 * 15 / 20)


def test_each_end_of_line_counts_as_a_word(text_checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(text_checkpoint)
    lines = ["w1 w2\n", "w3\n", "\n", "w4 w5 w6\n"]
    counts = [
        split_into_examples(texts, tokenizer, 6, None, "--train_file").words
        for texts in (lines, ["".join(lines)])
    ]
    assert counts == [10 * 5 / 6] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--train_file": "nowhere.txt"}, "--train_file 'nowhere.txt'"),
        ({"--sequence_length": "1"}, "--sequence_length 1: .* at least 2"),
        ({"--sequence_length": "65"}, "--sequence_length 65: .*64 positions"),
        ({"--max_eval_samples": "3", "--noise": "pqq"}, "--noise 'pqq'"),
        ({"--share_layers": "two"}, "--share_layers 'two'"),
        ({"--prune_layers": ".*9"}, "prune_layers='.\\*9'"),
    ],
)
def test_invalid_flags_are_named(text_checkpoint, texts, tmp_path, changed, change, words):
    given = flags(text_checkpoint, texts, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        main(changed(given, change))


def test_text_shorter_than_an_example_is_an_error(text_checkpoint, texts, tmp_path):
    texts["train"].write_text("w1 w2 w3\n")
    with pytest.raises(ValueError, match=r"--train_file: 3 tokens .*--sequence_length 16"):
        main(flags(text_checkpoint, texts, tmp_path))


def test_teacher_and_keep_noise_change_the_result(text_checkpoint, texts, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(text_checkpoint)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    losses = []
    for more in (
        [],
        ["--teacher_name_or_path", str(tmp_path / "other")],
        ["--noise", "pq", "--noise_rate", "0.5", "--keep_noise", "True"],
    ):
        words = flags(text_checkpoint, texts, tmp_path, "--do_train", "False", *TWO_STAGES, *more)
        values = main(words)
        assert "training" not in values["dense"]
        losses.append((values["dense"]["metrics"]["loss"], values["reloaded"]["metrics"]["loss"]))
    dense, small = zip(*losses, strict=True)
    assert len(set(dense)) == 1 and len(set(small)) == 3


def test_files_that_are_not_text_are_named(text_checkpoint, texts, tmp_path, changed):
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00")
    given = flags(text_checkpoint, texts, tmp_path)
    with pytest.raises(ValueError, match=r"--train_file .*text.*UTF-8"):
        main(changed(given, {"--train_file": str(tmp_path / "text")}))


@pytest.mark.parametrize("extension", ["csv", "json", "jsonl", "parquet"])
def test_tables_give_the_texts_of_their_column(write, tmp_path, extension):
    """As in transformers' run_clm.py; the commas and braces of the file are not text."""
    path = write(f"train.{extension}", {"id": [1, 2], "story": ["w1, w2", "w3\n"]})
    args = TextArguments(train_file=path, text_column="story")
    assert read_text(args, "train", str(tmp_path / "cache")) == ["w1, w2\n", "w3\n"]


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("story", ["w1"], r"--text_column 'text': expected one of .*--train_file .*: story"),
        ("text", [3], r"--text_column 'text': .*int64.*, expected text"),
        ("text", ["w1", None], r"--train_file .* 1 of 2 rows .*'text'"),
    ],
)
def test_invalid_tables_are_named(write, tmp_path, column, values, words):
    args = TextArguments(train_file=write("train.json", {column: values}))
    with pytest.raises(ValueError, match=words):
        read_text(args, "train", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tmp_path):
    """A dataset with only a test split, as a folder: read like one on the Hub."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.txt").write_text("w1 w2\nw3\n")
    return {"dataset_name": str(folder), "text_column": "text"}


def test_the_validation_split_of_a_dataset_is_a_flag(dataset, tmp_path):
    args = TextArguments(**dataset, validation_split="test")
    cache = str(tmp_path / "cache")
    assert read_text(args, "validation", cache) == ["w1 w2\n", "w3\n"]
    assert args.evaluated_dataset()["dataset_split"] == "test"


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("validation", r"--validation_split 'validation': .*\['test'\].*pass one of them"),
        ("train", r"--dataset_name '.*data': .*\"train\".*pass --train_file"),
    ],
)
def test_missing_splits_are_named(dataset, tmp_path, split, words):
    with pytest.raises(ValueError, match=words):
        read_text(TextArguments(**dataset), split, str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"dataset_name": "d", "train_file": "t", "validation_file": "v"},
            "--dataset_name d is not read with --train_file and --validation_file",
        ),
        (
            {"dataset_name": "d", "validation_file": "v", "validation_split": "test"},
            "--validation_split test .*--dataset_name, which is not read for validation",
        ),
        (
            {"validation_file": "v", "validation_split": "test"},
            "--validation_split test .*pass --d",
        ),
        ({"train_file": "t", "dataset_config_name": "raw"}, "--dataset_config_name raw requires"),
    ],
)
def test_flags_of_a_dataset_that_is_not_read_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        TextArguments(**given)
    TextArguments(dataset_name="d", train_file="t", validation_split="test")
