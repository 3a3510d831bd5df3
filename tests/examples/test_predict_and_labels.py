"""run_glue.py: predictions of test sets, both dev sets of MNLI, names of the labels, dtypes."""

from types import SimpleNamespace

import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from support.local_hub import write_dataset
from support.mistakes import trainer
from support.tiny import make_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    pipeline,
)

from hf_quantnoise.compression.training import precision
from hf_quantnoise.runs.glue import main
from hf_quantnoise.runs.glue_data import TASKS
from hf_quantnoise.runs.labels import LABELS, REGRESSION_TASKS, find_labels, labels_in

SHORT = [
    *("--n_centroids", "8", "--block_size", "4", "--stage_epochs", "0", "--max_steps", "2"),
    *("--use_cpu", "--disable_tqdm", "True", "--plots", "False", "--noise", "none"),
    *("--metrics", "sklearn"),
]


def run(model, folder, *flags):
    words = ["--model_name_or_path", str(model), "--output_dir", str(folder / "out")]
    return main([*words, "--cache_dir", str(folder / "cache"), *SHORT, *flags])


def copy_tokenizer(source, folder):
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def predictions(folder, name):
    frame = pandas.read_csv(folder / "out" / f"{name}.txt", sep="\t")
    assert list(frame["index"]) == list(range(len(frame)))
    return list(frame["prediction"])


# ---- predictions and the sets of MNLI ------------------------------------------------------------


def test_mnli_scores_and_predicts_matched_and_mismatched(
    tiny_model, sentences, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    counts = {
        "train": 16, "validation_matched": 12, "validation_mismatched": 9, "test_matched": 5,
        "test_mismatched": 7,
    }  # fmt: skip
    splits = {}
    for seed, (split, count) in enumerate(counts.items()):
        texts, labels = sentences(count, seed)
        labels = [-1] * count if split.startswith("test") else labels
        splits[split] = {"premise": texts, "hypothesis": texts[::-1], "label": labels}
    write_dataset(tmp_path, "nyu-mll/glue", "mnli", splits, list(LABELS["mnli"]))
    both = ["--do_train", "--do_eval", "--do_predict"]
    results = run(tiny_model, tmp_path, "--task_name", "mnli", *both, "--max_predict_samples", "6")
    for part in ("dense", "reloaded"):
        assert {"accuracy", "accuracy_mm", "loss_mm"} <= set(results[part]["metrics"])
    # The mismatched set has another size, so its accuracy is another fraction.
    assert (9 * results["reloaded"]["metrics"]["accuracy_mm"]) % 1 == pytest.approx(0, abs=1e-6)
    header = capsys.readouterr().out.rstrip().splitlines()[-4]
    assert header.split()[-2:] == ["accuracy", "accuracy_mm"]
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "compressed")
    assert list(small.config.id2label.values()) == list(LABELS["mnli"])
    for name, count in (("predict_results_mnli", 5), ("predict_results_mnli-mm", 6)):
        found = predictions(tmp_path, name)
        assert len(found) == count and set(found) <= set(LABELS["mnli"])


@pytest.mark.parametrize("compress", ["True", "False"])
def test_predictions_are_those_of_the_saved_model(
    compress, tiny_model, glue_files, write, tmp_path, sentences
):
    texts, _ = sentences(10, 3)
    test_file = write("test.csv", {"sentence": texts})  # without labels
    flags = [*glue_files(tmp_path), "--test_file", test_file, "--task_name", "sst2"]
    run(tiny_model, tmp_path, *flags, "--do_train", "--do_predict", "--compress", compress)
    folder = tmp_path / "out" / ("compressed" if compress == "True" else "dense")
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    found = predictions(tmp_path, "predict_results_sst2")
    assert found == [classify(text)[0]["label"] for text in texts]


def test_predictions_keep_the_order_of_the_file(tiny_model, write, tmp_path, sentences):
    texts, _ = sentences(10, 3)
    test_file = write("test.csv", {"sentence": texts})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).eval()
    model.classifier.weight.data *= 100  # so that the values differ
    model.save_pretrained(tmp_path / "finetuned")
    copy_tokenizer(tiny_model, tmp_path / "finetuned")
    flags = ["--test_file", test_file, "--do_predict", "--compress", "False"]
    flags += ["--train_sampling_strategy", "group_by_length"]
    run(tmp_path / "finetuned", tmp_path, *flags)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert predictions(tmp_path, "predict_results") == pytest.approx(logits, abs=1e-3)


def test_predictions_alone_use_the_labels_of_the_checkpoint(tiny_model, write, tmp_path, sentences):
    config = AutoConfig.from_pretrained(tiny_model, id2label={0: "no", 1: "yes", 2: "maybe"})
    model = AutoModelForSequenceClassification.from_config(config)
    folder = tmp_path / "finetuned"
    model.save_pretrained(folder)
    copy_tokenizer(tiny_model, folder)
    test_file = write("test.csv", {"sentence": sentences(6, 0)[0]})
    results = run(folder, tmp_path, "--test_file", test_file, "--do_predict")
    assert set(predictions(tmp_path, "predict_results")) <= {"no", "yes", "maybe"}
    assert "metrics" not in results["reloaded"]
    with pytest.raises(ValueError, match=r"--do_predict needs a finetuned --model_name_or_path"):
        run(tiny_model, tmp_path, "--test_file", test_file, "--do_predict")


def test_regression_predicts_values(tiny_model, write_sets, write, tmp_path, sentences):
    texts = sentences(5, 0)[0]
    test_file = write("test.csv", {"sentence1": texts, "sentence2": texts})
    files = write_sets("parquet", names=(1, 5), pair=True)
    flags = [*files, "--test_file", test_file, "--task_name", "stsb", "--do_train", "--do_predict"]
    run(tiny_model, tmp_path, *flags)
    assert all(isinstance(value, float) for value in predictions(tmp_path, "predict_results_stsb"))


def test_missing_test_file_is_named(tiny_model, write_sets, tmp_path):
    with pytest.raises(ValueError, match=r"missing --test_file.*--do_predict False"):
        run(tiny_model, tmp_path, *write_sets(), "--do_train", "--do_predict")


# ---- names of the labels -------------------------------------------------------------------------


def test_every_task_with_classes_has_names():
    assert LABELS.keys() == TASKS.keys() - set(REGRESSION_TASKS)


@pytest.mark.parametrize("form", ["ids", "names", "some ids", "features"])
@pytest.mark.parametrize("task", LABELS)
def test_labels_of_local_files_have_the_names_of_the_task(task, form):
    names = list(LABELS[task])
    values = {
        "ids": list(range(len(names))), "names": names[::-1], "some ids": [len(names) - 1],
        "features": list(range(len(names))),
    }[form]  # fmt: skip
    rows = Dataset.from_dict({"text": ["a"] * len(values), "label": values})
    if form == "features":
        label = ClassLabel(names=names)
        rows = rows.cast(Features({"text": Value("string"), "label": label}))
    ids, found = find_labels({"train_file": rows}, "label", task, BertConfig(), False)
    assert found == names
    assert [found[ids[value]] for value in values] == (
        values if form == "names" else [names[value] for value in values]
    )


def test_other_labels_of_a_task_keep_their_names():
    rows = Dataset.from_dict({"label": [3, 4]})
    assert labels_in(rows, "label", "sst2") == ([3, 4], ["3", "4"])
    assert labels_in(rows, "label", None) == ([3, 4], ["3", "4"])


def test_checkpoint_with_other_order_keeps_its_ids():
    config = BertConfig(id2label={0: "POSITIVE", 1: "NEGATIVE"})
    config.architectures = ["BertForSequenceClassification"]
    rows = Dataset.from_dict({"label": [0, 1]})
    ids, names = find_labels({"train_file": rows}, "label", "sst2", config, False)
    assert (ids, names) == ({0: 1, 1: 0}, ["POSITIVE", "NEGATIVE"])


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoint_is_loaded_as_float32_with_a_warning(
    dtype, tiny_model, glue_files, tmp_path, caplog
):
    folder = tmp_path / "half"
    AutoModel.from_pretrained(tiny_model, dtype=dtype).save_pretrained(folder)
    copy_tokenizer(tiny_model, folder)
    results = run(folder, tmp_path, *glue_files(tmp_path))
    assert results["dense"]["dtype"] == "float32"
    assert f"weights are {dtype}; they are loaded as float32" in caplog.text.replace("torch.", "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trainer_warns_of_weights_trained_in_half_precision(dtype, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(precision.logger, "warning_once", messages.append)
    trainer(tmp_path, model=make_model("bert").to(dtype), max_steps=1).train()
    name = str(dtype).removeprefix("torch.")
    assert len(messages) == 1 and name in messages[0] and "dtype='float32'" in messages[0]
    # Frozen weights do not count.
    frozen = make_model("bert").to(dtype).requires_grad_(False)
    frozen.classifier.float().requires_grad_(True)
    precision.check_trained_dtypes(frozen, SimpleNamespace(fp16=True))
    trainer(tmp_path, max_steps=1).train()
    assert len(messages) == 1


def test_float16_weights_with_fp16_are_refused():
    with pytest.raises(ValueError, match=r"fp16=True: .* float16.*; load the model with"):
        precision.check_trained_dtypes(make_model("bert").half(), SimpleNamespace(fp16=True))
