"""Data of the GLUE example: what is found in files, and what is said of files that will not do."""

import numpy as np
import pytest
from transformers import AutoTokenizer, BertConfig, EvalPrediction

from hf_quantnoise.runs.glue_data import DataArguments, load_glue_data, tokenize
from hf_quantnoise.runs.glue_labels import METRICS, metrics_function

NO_HEAD = BertConfig()


def checkpoint_for(*names: str) -> BertConfig:
    """The config of a checkpoint that has a head for these labels."""
    config = BertConfig(id2label=dict(enumerate(names)))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.architectures = ["BertForSequenceClassification"]
    return config


@pytest.fixture
def load(tmp_path):
    """Reads data by flags (``train_file=...``), cached in the test's own folder."""

    def load_data(config=NO_HEAD, *, train=True, validation=True, new_head=False, **flags):
        return load_glue_data(
            DataArguments(**flags),
            config,
            train=train,
            validation=validation,
            ignore_mismatched_sizes=new_head,
            cache_dir=str(tmp_path / "cache"),
        )

    return load_data


def as_flags(words: list[str]) -> dict[str, str]:
    return {k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize("extension", ["csv", "json", "jsonl", "parquet"])
def test_formats_hold_the_same(extension, write_sets, load, tiny_model):
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


def test_words_that_look_like_missing_values_are_words(write, load):
    texts = ["null", "n/a", "NA", "None", "nan"]
    path = write("train.csv", {"sentence": texts, "label": [0, 1, 0, 1, 0]})
    assert load(train_file=path, validation=False).train["sentence"][:] == texts


def test_pairs_are_found_and_truncated_together(write_sets, load, tiny_model):
    args = as_flags(write_sets("parquet", pair=True))
    data = load(**args)
    assert data.keys == ("sentence1", "sentence2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    arguments = DataArguments(**args, max_seq_length=8, pad_to_max_length=True)
    rows = tokenize(data, tokenizer, arguments, None).train
    assert {len(ids) for ids in rows["input_ids"]} == {8}
    assert all(ids.count(tokenizer.sep_token_id) == 2 for ids in rows["input_ids"])


def test_no_longer_than_the_model_takes(write_sets, load, tiny_model):
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


def test_first_samples_of_one_shuffle(write_sets, load):
    args = as_flags(write_sets("parquet"))
    whole = load(**args).train["sentence"][:]
    first = load(**args, max_train_samples=10, max_eval_samples=7)
    assert (first.train["sentence"][:], len(first.validation)) == (whole[:10], 7)
    shuffled = [
        load(**args, max_train_samples=count, shuffle_train_dataset=True).train["sentence"][:]
        for count in (10, 20)
    ]
    assert shuffled[0] == shuffled[1][:10] != whole[:10]
    assert set(shuffled[1]) <= set(whole)


# ---- labels --------------------------------------------------------------------------------------


def test_a_checkpoints_own_label_ids_hold(write_sets, load):
    data = load(checkpoint_for("Great", "dull"), **as_flags(write_sets(names=("dull", "great"))))
    assert data.label_names == ["Great", "dull"]
    assert data.label_values == {"dull": 1, "great": 0}


def test_integers_are_a_checkpoints_ids(write_sets, load):
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
    assert load(checkpoint_for("x", "y", "z"), new_head=True, **args).num_labels == 2


def test_floats_are_regression(write_sets, load):
    args = as_flags(write_sets("parquet", names=(0.5, 4.0)))
    data = load(**args)
    assert data.is_regression and data.num_labels == 1
    assert data.metrics == ("pearson", "spearmanr")
    with pytest.raises(ValueError, match=r"head for 3 labels.*regression.*--ignore_mismatched"):
        load(checkpoint_for("x", "y", "z"), **args)
    with pytest.raises(ValueError, match=r"--task_name 'sst2' has classes.*float64.*integers"):
        load(**args, task_name="sst2")


def test_stsb_takes_integers_as_numbers(write_sets, load, tiny_model):
    args = as_flags(write_sets("parquet", names=(1, 5), pair=True)) | {"task_name": "stsb"}
    data = load(**args)
    assert data.is_regression
    rows = tokenize(data, AutoTokenizer.from_pretrained(tiny_model), DataArguments(**args), None)
    assert {type(label) for label in rows.train["label"]} == {float}


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_against_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    predicted = np.where(rng.random(200) < 0.7, labels, 1 - labels)
    hit = predicted == labels
    tp, tn = (hit & (labels == 1)).sum(), (hit & (labels == 0)).sum()
    fp, fn = (~hit & (labels == 0)).sum(), (~hit & (labels == 1)).sum()
    assert METRICS["accuracy"](predicted, labels) == pytest.approx((tp + tn) / 200)
    assert METRICS["f1"](predicted, labels) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert METRICS["matthews_correlation"](predicted, labels) == pytest.approx(matthews)
    x, y = rng.normal(size=(2, 50))
    assert METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    assert METRICS["spearmanr"](x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_predictions_are_read_off_the_logits():
    logits = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
    labels = np.array([1, 0, 0, 1])
    compute = metrics_function(("accuracy", "f1"), is_regression=False)
    assert compute(EvalPrediction((logits, "hidden"), labels)) == {"accuracy": 0.75, "f1": 0.8}
    compute = metrics_function(("pearson",), is_regression=True)
    numbers = EvalPrediction(np.array([[1.0], [2.0], [3.0]]), np.array([2.0, 4.0, 6.0]))
    assert compute(numbers)["pearson"] == pytest.approx(1.0)


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task_name": "sst"}, r"--task_name 'sst' is unknown; choose one of cola, mnli"),
        ({"max_seq_length": 0}, r"--max_seq_length 0 must be at least 1"),
        ({"max_train_samples": -5}, r"--max_train_samples -5 must be at least 1"),
        ({"sentence2_key": "b"}, r"--sentence2_key 'b' needs --sentence1_key"),
    ],
)
def test_flags_that_will_not_do(flags, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**flags)


def test_files_that_will_not_do(write, write_sets, load, tmp_path):
    args = as_flags(write_sets())
    with pytest.raises(ValueError, match=r"no data: give --train_file.*--task_name"):
        load()
    with pytest.raises(FileNotFoundError, match=r"--train_file '.*absent\.csv' is no file"):
        load(train_file=str(tmp_path / "absent.csv"))
    with pytest.raises(ValueError, match=r"--validation_file is missing.*--do_eval False"):
        load(train_file=args["train_file"])
    with pytest.raises(ValueError, match=r"--train_file is missing.*--do_train False"):
        load(validation_file=args["validation_file"])
    strange = tmp_path / "train.tsv"
    strange.write_text("sentence\tlabel\na\t0\n")
    with pytest.raises(ValueError, match=r"--train_file .*'\.tsv' is unknown; give a \.parquet"):
        load(train_file=str(strange))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"--train_file .*broken\.parquet' cannot be read as parq"):
        load(train_file=str(broken))
    empty = write("empty.csv", {"sentence": [], "label": []})
    with pytest.raises(
        ValueError, match=r"--train_file .*empty\.csv' cannot be read as csv, or holds no rows"
    ):
        load(train_file=empty)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"sentence": ["a"], "class": [0]},
            r"no label column 'label'; its columns are \['sentence', 'class'\].*--label_column",
        ),
        (
            {"a": ["x"], "b": ["y"], "c": ["z"], "label": [0]},
            r"columns \['a', 'b', 'c', 'label'\].*--sentence1_key",
        ),
        ({"sentence": [1.5], "label": [0]}, r"--sentence1_key: column 'sentence' .* not text"),
        (
            {"sentence": ["a", None], "label": [0, 1]},
            r"1 of 2 rows with nothing in column 'sentence'",
        ),
        (
            {"sentence": ["a", "b"], "label": ["x", None]},
            r"1 of 2 rows with nothing in column 'label'",
        ),
        ({"sentence": ["a"], "label": [-1]}, r"holds -1, GLUE's mark for a hidden label"),
    ],
)
def test_columns_that_will_not_do(columns, message, write, load):
    with pytest.raises(ValueError, match=message):
        load(train_file=write("train.json", columns), validation=False)


def test_sets_must_agree(write, load):
    train = write("train.csv", {"sentence": ["a", "b"], "label": ["x", "y"]})
    other = write("other.csv", {"text": ["a"], "label": ["x"]})
    with pytest.raises(
        ValueError, match=r"--validation_file '.*' has no column 'sentence'.*\['text', 'label'\]"
    ):
        load(train_file=train, validation_file=other)
    strange = write("strange.csv", {"sentence": ["a"], "label": ["z"]})
    with pytest.raises(
        ValueError, match=r"--validation_file.*labels \['z'\], unknown.*\['x', 'y'\]"
    ):
        load(train_file=train, validation_file=strange)


def test_f1_needs_two_labels(write, load):
    columns = {"sentence1": ["a"] * 3, "sentence2": ["b"] * 3, "label": [0, 1, 2]}
    with pytest.raises(ValueError, match=r"--task_name 'mrpc' is scored by F1, which needs 2"):
        load(train_file=write("train.csv", columns), validation=False, task_name="mrpc")


def test_the_hub_out_of_reach(load, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("hf_quantnoise.runs.glue_data.load_dataset", unreachable)
    with pytest.raises(ConnectionError, match=r"--task_name 'sst2' .*nyu-mll/glue.*--train_file"):
        load(task_name="sst2")
