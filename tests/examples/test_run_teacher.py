"""--teacher_name_or_path of the examples, and files of flags that are not objects."""

import json
import shutil

import pytest
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_quantnoise import QuantNoiseTrainer
from hf_quantnoise.runs.glue import main, parse
from hf_quantnoise.runs.labels import check_teacher

ORDER = r"--teacher_name_or_path .*\['dog', 'cat'\].* in the same order, .*\['cat', 'dog'\]"
SHORT = [
    *("--do_train", "False", "--stage_epochs", "0.1", "--n_centroids", "8", "--block_size", "4"),
    *("--noise", "none", "--metrics", "sklearn", "--plots", "False", "--disable_tqdm", "True"),
]


@pytest.fixture
def run(tiny_model, write_sets, tmp_path):
    files = write_sets(names=("cat", "dog"))

    def run_with(teacher):
        words = ["--model_name_or_path", tiny_model, "--output_dir", str(tmp_path / "out")]
        return main([*words, *files, *SHORT, "--teacher_name_or_path", str(teacher)])

    return run_with


def test_teacher_with_other_label_ids_is_refused(run, tiny_model, tmp_path):
    """Its outputs would be those of other labels."""
    labels = {0: "dog", 1: "cat"}
    teacher = AutoModelForSequenceClassification.from_pretrained(tiny_model, id2label=labels)
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=ORDER):
        run(tmp_path / "teacher")


def test_check_teacher_allows_other_names():
    """Labels of data may be ids, in any case; the number must be the same."""
    ids, names = (BertConfig(id2label=labels) for labels in ({0: "0", 1: "1"}, {0: "No", 1: "Yes"}))
    check_teacher(names, ids)
    check_teacher(names, BertConfig(id2label={0: "no", 1: "yes"}))
    with pytest.raises(ValueError, match=r"got a model with the 2 labels .* 3 labels"):
        check_teacher(names, BertConfig(num_labels=3))


def test_teacher_without_head_is_refused(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(QuantNoiseTrainer, "compress", None)  # it is refused before
    shutil.copytree(tiny_model, tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher' lacks 2 weights of BertForSequence.*random"):
        run(tmp_path / "teacher")


def test_file_of_flags_must_be_an_object(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text(json.dumps([{"model_name_or_path": "m"}]))
    with pytest.raises(ValueError, match=r"flags\.json': got a JSON list, expected an object"):
        parse([str(path)])
