"""Labels of the GLUE example: their ids, those of a checkpoint, and F1 of a task."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from support.checkpoint_labels import checkpoint_for
from support.glue_runs import as_flags
from transformers import BertConfig, EvalPrediction

from hf_quantnoise.runs.arguments import ModelArguments
from hf_quantnoise.runs.glue import of_task_ids
from hf_quantnoise.runs.glue_data import DataArguments, load_glue_data
from hf_quantnoise.runs.labels import LABELS, set_labels
from hf_quantnoise.runs.metrics import sklearn_metrics


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


def test_set_labels_needs_two_labels():
    with pytest.raises(ValueError, match=r"all examples have the label 'x', .*at least 2"):
        set_labels(BertConfig(), ["x"])


def test_set_labels_replaces_the_problem_of_another_head():
    config = BertConfig(num_labels=1, problem_type="regression")
    set_labels(config, ["no", "yes"])
    assert (config.problem_type, config.id2label) == (None, {0: "no", 1: "yes"})


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
