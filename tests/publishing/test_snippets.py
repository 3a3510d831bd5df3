"""The code on a card runs on a saved model; tests/hub/test_hub_transfers.py runs it as pasted."""

import contextlib
import io

import pytest
from support.stacked import make_stacked
from support.tiny import SIZES, make_model
from support.words import words
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

from hf_quantnoise import IPQConfig, QuantNoiseCard, quantize_model, write_model_card
from hf_quantnoise.publishing.snippets import usage_snippet

SMALL = IPQConfig(n_centroids=16, block_size=4)
PIPELINES = {
    "fill-mask": lambda: make_model("bert-mlm"),
    "token-classification": lambda: BertForTokenClassification(BertConfig(**SIZES)),
    "feature-extraction": lambda: make_model("bert").bert,
}


def code_of(path):
    return open(path).read().split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("task", PIPELINES)
def test_snippet_runs_the_pipeline_of_the_task(task, tmp_path):
    model = quantize_model(PIPELINES[task]().eval(), SMALL, progress=False)
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)  # known by the folder alone
    code = code_of(write_model_card(model, tmp_path, QuantNoiseCard(repo_id=str(tmp_path))))
    assert f'pipeline("{task}"' in code
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, names)
    assert type(names["pipe"].model) is type(model) and output.getvalue().strip()


def test_snippet_loads_models_without_a_pipeline(tmp_path):
    model = quantize_model(make_stacked("t5"), SMALL, progress=False)
    model.save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    names = {}
    exec(code_of(write_model_card(model, tmp_path, QuantNoiseCard(repo_id=str(tmp_path)))), names)
    assert type(names["model"]) is type(model) and names["tokenizer"].vocab_size
    assert "pipe" not in names


@pytest.mark.parametrize(
    ("processing", "words_of_code"),
    [
        (None, 'AutoModelForTokenClassification.from_pretrained("me/small")'),
        ("me/base", 'model="me/small", tokenizer="me/base")'),
        ("me/small", 'model="me/small")'),
    ],
)
def test_snippet_names_the_repository_of_the_tokenizer(processing, words_of_code):
    model = BertForTokenClassification(BertConfig(**SIZES))
    for packed in (True, False):
        code = usage_snippet(model, "me/small", processing, packed)
        assert words_of_code in code
        assert code.startswith("import hf_quantnoise") == packed
        compile(code, "card", "exec")


def test_snippet_of_a_class_without_auto_class(tmp_path):
    custom: type[PreTrainedModel] = type("Custom", (BertModel,), {})
    model = custom(make_model("bert").config)
    code = usage_snippet(model, "me/small", "me/small", packed=True)
    assert "from hf_quantnoise import AutoQuantizedModel" in code and "tokenizer" in code
    compile(code, "card", "exec")
