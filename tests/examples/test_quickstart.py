"""docs/how_to/common_errors.md: each error it shows is raised with the same text."""

import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("hf_quantnoise")

import hf_quantnoise

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how_to" / "common_errors.md"
ERRORS = re.findall(r"```python\n([^`]*)```\n```text\n([^`]*)```", PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def names(tmp_path_factory):
    """The names in the code of the page, and the folder to run it in."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DefaultDataCollator,
        TrainingArguments,
        set_seed,
    )

    folder = tmp_path_factory.mktemp("quickstart")
    set_seed(0)
    config = BertConfig(num_hidden_layers=1, vocab_size=2000)
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder / "dense")
    small = hf_quantnoise.quantize_model(
        BertForSequenceClassification(config), hf_quantnoise.FixedPointConfig()
    )
    small.save_pretrained(folder / "small")
    for copy in ("truncated", "future", "mixed", "edited"):
        shutil.copytree(folder / "small", folder / copy)
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    changes = {
        "future": {"format_version": 9, "requires": "hf-quantnoise>=9.0"},
        "mixed": {"weights_id": "90b2d7e4"},
    }
    for copy, change in changes.items():
        file = folder / copy / "config.json"
        values = json.loads(file.read_text())
        values["quantization_config"] |= change
        file.write_text(json.dumps(values))
    file = folder / "edited" / "config.json"
    values = json.loads(file.read_text())
    del values["quantization_config"]["plan"]["classifier"]
    file.write_text(json.dumps(values))
    weights = folder / "mixed" / "model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "weights_id": "5e3c0a1f"})
    shutil.copytree(folder / "small", folder / "killed" / "interrupted-save")
    args = TrainingArguments(str(folder / "out"), use_cpu=True, report_to="none")
    own = {"model": model, "small": small, "args": args, "data_collator": DefaultDataCollator()}
    names = {name: getattr(hf_quantnoise, name) for name in hf_quantnoise.__all__}
    return folder, {**names, **own}


def test_page_has_errors():
    assert len(ERRORS) >= 8


@pytest.mark.parametrize(("code", "shown"), ERRORS, ids=[code.strip() for code, _ in ERRORS])
def test_errors_are_as_shown(code, shown, names, monkeypatch):
    folder, values = names
    monkeypatch.chdir(folder)
    is_first = code == ERRORS[0][0]  # which runs as it is
    with pytest.raises(Exception) as caught:
        exec(code, {} if is_first else dict(values))
    message = f"{type(caught.value).__name__}: {caught.value}"
    assert " ".join(message.split()) == " ".join(shown.split()), textwrap.fill(message, 98)
