"""Data of the GLUE example: columns and labels found in files, and errors about files."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer, BertConfig, EvalPrediction

from hf_quantnoise.runs.arguments import ModelArguments
from hf_quantnoise.runs.clm import TextArguments
from hf_quantnoise.runs.glue import dataset_of, of_task_ids, tokenize
from hf_quantnoise.runs.glue_data import DataArguments, load_glue_data
from hf_quantnoise.runs.labels import LABELS, set_labels
from hf_quantnoise.runs.metrics import sklearn_metrics

NO_HEAD = BertConfig()


def checkpoint_for(*names: str) -> BertConfig:
    """Return the config of a checkpoint with a head for these labels."""
    config = BertConfig(id2label=dict(enumerate(names)))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.architectures = ["BertForSequenceClassification"]
    return config


@pytest.fixture
def load(tmp_path):
    """Load data by flags (``train_file=...``), with a cache in the folder of the test."""

    def load_data(config=NO_HEAD, *, validation=True, new_head=False, **flags):
        cache = str(tmp_path / "cache")
        model = ModelArguments("m", cache_dir=cache, ignore_mismatched_sizes=new_head)
        splits = ["train", "validation"] if validation else ["train"]
        return load_glue_data(DataArguments(**flags), model, config, splits)

    return load_data


def as_flags(words: list[str]) -> dict[str, str]:
    return {k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)}


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


def test_label_ids_of_the_checkpoint_are_used(write_sets, load):
    data = load(checkpoint_for("Great", "dull"), **as_flags(write_sets(names=("dull", "great"))))
    assert data.label_names == ["Great", "dull"]
    assert data.label_values == {"dull": 1, "great": 0}


def test_integer_labels_are_ids_of_the_checkpoint(write_sets, load):
    data = load(checkpoint_for("negative", "positive"), **as_flags(write_sets()))
    assert data.label_names == ["negative", "positive"]
    assert data.label_values == {0: 0, 1: 1}


def test_integers_with_gaps_become_ids(write_sets, load):
    data = load(**as_flags(write_sets("parquet", names=(10, 2))))
    assert data.label_values == {2: 0, 10: 1}
    assert data.label_names == ["2", "10"]


def test_other_labels_need_a_new_head(write_sets, load):
    args = as_flags(write_sets(names=("dull", "great")))
    with pytest.raises(ValueError, match=r"3 labels \['x', 'y', 'z'\].*--ignore_mismatched_sizes"):
        load(checkpoint_for("x", "y", "z"), **args)
    assert load(checkpoint_for("x", "y", "z"), new_head=True, **args).label_names == [
        "dull",
        "great",
    ]


def test_labels_that_differ_in_case_keep_their_ids(write, load):
    path = write("train.csv", {"sentence": ["a", "b"], "label": ["us", "US"]})
    found = load(checkpoint_for("us", "US"), train_file=path, validation=False)
    assert found.label_values == {"us": 0, "US": 1}


def test_labels_of_a_large_head_are_listed_in_part(write_sets, load):
    head = checkpoint_for(*(f"class {i}" for i in range(1000)))
    with pytest.raises(
        ValueError, match=r"1000 labels \['class 0', .*'\.\.\.'\], the data"
    ) as error:
        load(head, **as_flags(write_sets(names=("dull", "great"))))
    assert "class 500" not in str(error.value)


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


def test_labels_that_are_not_finite_are_named(load, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"sentence": "a", "label": 1.5}\n{"sentence": "b", "label": NaN}\n')
    with pytest.raises(ValueError, match=r"--train_file: 1 of 2 labels .*'label' are NaN"):
        load(train_file=str(path), validation=False)


@pytest.fixture
def write_classes(tmp_path):
    """Write two rows with a column of classes of these names to a parquet file."""

    def write_classes(name, names, labels=(0, 1)):
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
        rows = Dataset.from_dict({"sentence": ["a", "b"], "label": labels}, features=features)
        rows.to_parquet(tmp_path / name)
        return str(tmp_path / name)

    return write_classes


def test_classes_in_another_order_are_named(write_classes, load):
    train = write_classes("train.parquet", ["no", "yes"])
    other = write_classes("other.parquet", ["yes", "no"])
    with pytest.raises(ValueError, match=r"--validation_file: .* class 0 is 'yes', and 'no' in"):
        load(train_file=train, validation_file=other)
    more = write_classes("more.parquet", ["no", "yes", "maybe"])
    assert load(train_file=train, validation_file=more).label_names == ["no", "yes"]


def test_hidden_labels_of_classes_are_named(write_classes, load):
    train = write_classes("train.parquet", ["no", "yes"])
    hidden = write_classes("hidden.parquet", ["no", "yes"], labels=(-1, -1))
    with pytest.raises(ValueError, match=r"--validation_file: column 'label' has the label -1"):
        load(train_file=train, validation_file=hidden)


def test_texts_as_labels_of_a_regression_are_named(write, load):
    train = write("train.csv", {"sentence": ["a", "b"], "label": [0.5, 1.5]})
    other = write("other.csv", {"sentence": ["a", "b"], "label": ["low", "high"]})
    with pytest.raises(ValueError, match=r"--validation_file: .*string.*expected the values of a"):
        load(train_file=train, validation_file=other)


@pytest.mark.parametrize("pad", [False, True])
def test_texts_without_tokens_are_named(write, load, text_checkpoint, pad):
    """A tokenizer that adds no special tokens makes no tokens of an empty text."""
    path = write("train.json", {"sentence": ["w1", " "], "label": [0, 1]})
    data = load(train_file=path, validation=False)
    tokenizer = AutoTokenizer.from_pretrained(text_checkpoint, pad_token="</s>")
    args = DataArguments(train_file=path, pad_to_max_length=pad)
    with pytest.raises(ValueError, match=r"has no tokens \(sentence=' '\); remove"):
        tokenize(data, tokenizer, args, None)


def test_set_labels_needs_two_labels():
    with pytest.raises(ValueError, match=r"all examples have the label 'x', .*at least 2"):
        set_labels(BertConfig(), ["x"])


def test_set_labels_replaces_the_problem_of_another_head():
    config = BertConfig(num_labels=1, problem_type="regression")
    set_labels(config, ["no", "yes"])
    assert (config.problem_type, config.id2label) == (None, {0: "no", 1: "yes"})


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


def test_f1_needs_two_labels(write, load):
    columns = {"sentence1": ["a"] * 3, "sentence2": ["b"] * 3, "label": [0, 1, 2]}
    with pytest.raises(ValueError, match=r"--task_name 'mrpc'.*F1 needs 2"):
        load(train_file=write("train.csv", columns), validation=False, task_name="mrpc")


@pytest.mark.parametrize("labels", [(0, 1), ("not_equivalent", "equivalent"), ("no", "yes")])
@pytest.mark.parametrize("swapped", [False, True])
def test_f1_is_that_of_the_task_for_any_order_in_the_checkpoint(labels, swapped, write, load):
    columns = {"sentence1": ["a"] * 4, "sentence2": ["b"] * 4, "label": [labels[1]] * 3}
    columns["label"].append(labels[0])
    names = labels if labels[0] == "no" else LABELS["mrpc"]
    head = checkpoint_for(*(names[::-1] if swapped else names))
    path = write("train.csv", columns)
    data = load(head, train_file=path, validation=False, task_name="mrpc")
    assert data.label_names[0] == names[swapped]
    ids = np.array([data.label_values[label] for label in data.train["label"]])
    # All are predicted to be equivalent: 3 of 4 are.
    logits = np.eye(2)[np.full(4, ids[0])]
    compute = of_task_ids(sklearn_metrics(data.metrics), data, "mrpc")
    expected = {"f1": pytest.approx(6 / 7), "accuracy": 0.75}
    assert compute(EvalPrediction(logits, ids)) == expected
    assert compute(EvalPrediction((logits, logits), ids)) == expected


def test_f1_of_a_checkpoint_with_one_output_is_an_error(write, tmp_path):
    head = checkpoint_for("score")
    test_file = write("test.csv", {"sentence1": ["a"], "sentence2": ["b"]})
    args = DataArguments(test_file=test_file, task_name="mrpc")
    with pytest.raises(ValueError, match=r"--task_name 'mrpc'.*F1 needs 2"):
        load_glue_data(args, ModelArguments("m", cache_dir=str(tmp_path)), head, ["test"])


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
