"""The benchmark of ONNX forms: logits in the order of the data, and the table of its rows."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

pytest.importorskip("sklearn")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

import onnx_forms
from results_file import read_lines

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_logits_are_in_the_order_of_the_data(tiny_model, sentences, batch_size):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [tokenizer(text) | {"label": 0} for text in sentences(10, 0)[0]]
    data = Dataset.from_list([dict(row) for row in rows])
    sizes = []

    def run(names, inputs):
        sizes.append(len(inputs["input_ids"]))
        assert "labels" not in inputs
        return [(inputs["input_ids"] * inputs["attention_mask"]).sum(1, keepdims=True)]

    session = SimpleNamespace(run=run)
    found = onnx_forms.logits_in_onnxruntime(session, data, tiny_model, batch_size)
    assert found[:, 0].tolist() == [sum(row["input_ids"]) for row in rows]
    assert max(sizes) == batch_size and len(set(found.flatten().tolist())) > 1


def test_page_has_the_table_of_the_rows():
    lines = read_lines(str(ROOT / "benchmarks" / "results" / "quality_onnx_forms.jsonl"))
    page = (ROOT / "docs" / "how_to" / "export.md").read_text("utf-8")
    assert lines and onnx_forms.table(lines) in page
