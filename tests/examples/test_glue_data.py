"""Data of the GLUE example: columns and labels found in files, and errors about files."""

import pytest
from support.checkpoint_labels import NO_HEAD, checkpoint_for
from support.glue_runs import as_flags
from transformers import AutoTokenizer

from hf_quantnoise.runs.arguments import ModelArguments
from hf_quantnoise.runs.clm import TextArguments
from hf_quantnoise.runs.glue import dataset_of, tokenize
from hf_quantnoise.runs.glue_data import DataArguments, load_glue_data


@pytest.mark.parametrize("extension", ["csv", "json", "jsonl", "parquet"])
def test_all_formats_give_the_same_data(extension, write_sets, load, tiny_model):
    args = as_flags(write_sets(extension, names=("dull", "great")))
    data = load(**args)
    assert data.keys == ("sentence", None)
    assert data.label_names == ["dull", "great"]
    assert (len(data.train), len(data.validation)) == (64, 24)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = tokenize(data, tokenizer, DataArguments(**args), None).validation
    assert set(rows.column_names) >= {"input_ids", "attention_mask", "label"}
    for row, text, label in zip(
        rows, data.validation["sentence"], data.validation["label"], strict=True
    ):
        assert row["input_ids"] == tokenizer(text)["input_ids"]
        assert row["label"] == ("dull", "great").index(label)


def test_words_that_look_like_missing_values_are_kept(write, load):
    texts = ["null", "n/a", "NA", "None", "nan"]
    path = write("train.csv", {"sentence": texts, "label": [0, 1, 0, 1, 0]})
    assert load(train_file=path, validation=False).train["sentence"][:] == texts


@pytest.mark.parametrize(("name", "other"), [("t[1].csv", "t1.csv"), ("t*.csv", "t1.csv")])
def test_file_names_are_not_patterns(name, other, write, load):
    write(other, {"sentence": ["other", "other"], "label": [0, 1]})
    path = write(name, {"sentence": ["a", "b"], "label": [0, 1]})
    assert load(train_file=path, validation=False).train["sentence"][:] == ["a", "b"]


def test_pairs_are_found_and_truncated_together(write_sets, load, tiny_model):
    args = as_flags(write_sets("parquet", pair=True))
    data = load(**args)
    assert data.keys == ("sentence1", "sentence2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    arguments = DataArguments(**args, max_seq_length=8, pad_to_max_length=True)
    rows = tokenize(data, tokenizer, arguments, None).train
    assert {len(ids) for ids in rows["input_ids"]} == {8}
    assert all(ids.count(tokenizer.sep_token_id) == 2 for ids in rows["input_ids"])


def test_truncation_to_the_limit_of_the_model(write_sets, load, tiny_model):
    args = as_flags(write_sets("csv"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = tokenize(load(**args), tokenizer, DataArguments(**args), model_limit=5).train
    assert max(map(len, rows["input_ids"])) == 5


@pytest.mark.parametrize(
    ("columns", "keys"),
    [
        ({"text": ["a"], "label": [0]}, ("text", None)),
        ({"review": ["a"], "stars": [3], "label": [0]}, ("review", None)),
        ({"question": ["a"], "answer": ["b"], "label": [0]}, ("question", "answer")),
        ({"idx": [0], "premise": ["a"], "hypothesis": ["b"], "label": [0]}, None),
    ],
)
def test_sentence_columns_by_name_or_type(columns, keys, write, load):
    found = load(train_file=write("train.json", columns), validation=False).keys
    assert found == (keys or ("premise", "hypothesis"))


def test_truncation_after_shuffling(write_sets, load):
    args = as_flags(write_sets("parquet"))
    sentences = load(**args).train["sentence"][:]
    first = load(**args, max_train_samples=10, max_eval_samples=7)
    assert (first.train["sentence"][:], len(first.validation)) == (sentences[:10], 7)
    shuffled = [
        load(**args, max_train_samples=count, shuffle_train_dataset=True).train["sentence"][:]
        for count in (10, 20)
    ]
    assert shuffled[0] == shuffled[1][:10] != sentences[:10]
    assert set(shuffled[1]) <= set(sentences)


# ---- labels --------------------------------------------------------------------------------------


def test_floats_are_regression(write_sets, load):
    args = as_flags(write_sets("parquet", names=(0.5, 4.0)))
    data = load(**args)
    assert data.is_regression
    assert data.metrics == ("pearson", "spearmanr")
    with pytest.raises(ValueError, match=r"head for 3 labels.*regression.*--ignore_mismatched"):
        load(checkpoint_for("x", "y", "z"), **args)
    with pytest.raises(ValueError, match=r"--task_name 'sst2' has classes.*float64.*integers"):
        load(**args, task_name="sst2")


@pytest.mark.parametrize("other", [7, True, "x"])
def test_other_columns_do_not_change_the_labels(other, write, load, tiny_model):
    columns = {"sentence": ["a", "b"], "score": [1.0, 2.0]}
    more = {"label": [other] * 2, "input_ids": [other] * 2}
    path = write("train.parquet", columns | more)
    flags = {"train_file": path, "label_column": "score", "sentence1_key": "sentence"}
    data = load(validation=False, **flags)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = tokenize(data, tokenizer, DataArguments(**flags), None).train
    assert rows.features["label"].dtype == "float64" and rows["label"][:] == [1.0, 2.0]
    assert rows["input_ids"][:] == tokenizer(["a", "b"])["input_ids"]


def test_stsb_with_integers_is_regression(write_sets, load, tiny_model):
    args = as_flags(write_sets("parquet", names=(1, 5), pair=True)) | {"task_name": "stsb"}
    data = load(**args)
    assert data.is_regression
    rows = tokenize(data, AutoTokenizer.from_pretrained(tiny_model), DataArguments(**args), None)
    assert {type(label) for label in rows.train["label"]} == {float}


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task_name": "sst"}, r"--task_name 'sst'.*cola, mnli"),
        ({"max_seq_length": 0}, r"--max_seq_length 0: .*at least 1"),
        ({"max_train_samples": -5}, r"--max_train_samples -5"),
        ({"sentence2_key": "b"}, r"--sentence2_key 'b'.*--sentence1_key"),
    ],
)
def test_invalid_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**flags)


def test_invalid_files_are_named(write, write_sets, load, tmp_path):
    args = as_flags(write_sets())
    with pytest.raises(ValueError, match=r"no data.*--train_file.*--task_name"):
        load()
    with pytest.raises(FileNotFoundError, match=r"--train_file '.*absent\.csv'"):
        load(train_file=str(tmp_path / "absent.csv"))
    with pytest.raises(ValueError, match=r"missing --validation_file.*--do_eval False"):
        load(train_file=args["train_file"])
    with pytest.raises(ValueError, match=r"missing --train_file.*--do_train False"):
        load(validation_file=args["validation_file"])
    unknown = tmp_path / "train.tsv"
    unknown.write_text("sentence\tlabel\na\t0\n")
    with pytest.raises(ValueError, match=r"--train_file .*'\.tsv'.*\.parquet"):
        load(train_file=str(unknown))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"--train_file .*broken\.parquet"):
        load(train_file=str(broken))
    empty = write("empty.csv", {"sentence": [], "label": []})
    with pytest.raises(
        ValueError, match=r"--train_file .*empty\.csv.*csv file with at least one row"
    ):
        load(train_file=empty)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"sentence": ["a"], "class": [0]},
            r"--label_column 'label'.*sentence, class",
        ),
        (
            {"a": ["x"], "b": ["y"], "c": ["z"], "label": [0]},
            r"columns \['a', 'b', 'c', 'label'\].*--sentence1_key",
        ),
        ({"sentence": [1.5], "label": [0]}, r"--sentence1_key 'sentence'.* expected text"),
        (
            {"sentence": ["a", None], "label": [0, 1]},
            r"1 of 2 rows .*'sentence'",
        ),
        (
            {"sentence": ["a", "b"], "label": ["x", None]},
            r"1 of 2 rows .*'label'",
        ),
        ({"sentence": ["a"], "label": [-1]}, r"column 'label' has the label -1"),
        (
            {"sentence": ["a"], "label": [["x", "y"]]},
            r"--label_column 'label'.*expected one label per row",
        ),
    ],
)
def test_invalid_columns_are_named(columns, message, write, load):
    with pytest.raises(ValueError, match=message):
        load(train_file=write("train.json", columns), validation=False)


@pytest.mark.parametrize("pad", [False, True])
def test_texts_without_tokens_are_named(write, load, text_checkpoint, pad):
    """A tokenizer that adds no special tokens makes no tokens of an empty text."""
    path = write("train.json", {"sentence": ["w1", " "], "label": [0, 1]})
    data = load(train_file=path, validation=False)
    tokenizer = AutoTokenizer.from_pretrained(text_checkpoint, pad_token="</s>")
    args = DataArguments(train_file=path, pad_to_max_length=pad)
    with pytest.raises(ValueError, match=r"has no tokens \(sentence=' '\); remove"):
        tokenize(data, tokenizer, args, None)


def test_files_must_have_the_same_columns_and_labels(write, load):
    train = write("train.csv", {"sentence": ["a", "b"], "label": ["x", "y"]})
    other = write("other.csv", {"text": ["a"], "label": ["x"]})
    with pytest.raises(
        ValueError, match=r"--validation_file '.*' has no column 'sentence'.*\['text', 'label'\]"
    ):
        load(train_file=train, validation_file=other)
    unknown = write("unknown.csv", {"sentence": ["a"], "label": ["z"]})
    with pytest.raises(ValueError, match=r"--validation_file.*labels \['z'\].*\['x', 'y'\]"):
        load(train_file=train, validation_file=unknown)


def test_run_without_data_is_an_error():
    with pytest.raises(ValueError, match="nothing to do: pass --do_train"):
        load_glue_data(DataArguments(task_name="sst2"), ModelArguments("m"), NO_HEAD, [])


def test_unreachable_hub_is_named(load, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("hf_quantnoise.runs.glue_data.load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"--task_name 'sst2' .*nyu-mll/glue.*--train_file"):
        load(task_name="sst2")


def test_job_names_dataset_configuration_and_split():
    """For the metadata of the card; files may hold any data, so that only the task is named."""
    hub = {"dataset": "GLUE MNLI", "dataset_id": "nyu-mll/glue", "dataset_config": "mnli"}
    assert dataset_of(DataArguments(task_name="MNLI")) == {
        **hub, "dataset_split": "validation_matched",
    }  # fmt: skip
    files = {"train_file": "a.csv", "validation_file": "b.csv"}
    assert dataset_of(DataArguments(task_name="sst2", **files)) == {"dataset": "GLUE SST2"}
    assert dataset_of(DataArguments(**files)) == {}
    text = TextArguments(dataset_name="me/text", dataset_config_name="raw")
    assert text.evaluated_dataset() == {
        "dataset": "me/text", "dataset_id": "me/text", "dataset_config": "raw",
        "dataset_split": "validation",
    }  # fmt: skip
    assert TextArguments(dataset_name="me/text", validation_file="b.txt").evaluated_dataset() == {}
