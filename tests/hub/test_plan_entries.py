"""Entries of the saved plan are checked before a model is loaded or reported."""

import json
import shutil

import pytest
import torch
from support.damage import edit_config
from support.stored import PQ
from support.tiny import make_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

from hf_quantnoise import AutoQuantizedModel, FixedPointConfig, IPQConfig, quantize_model
from hf_quantnoise.cli import main
from hf_quantnoise.configuration import QuantizedModelConfig

LAYER = "bert.encoder.layer.1.output.dense"
KINDS = {
    "pq": IPQConfig(**PQ),
    "additive": IPQConfig(block_size=8, n_centroids=8, n_codebooks=2, row_scale=True),
    "int": FixedPointConfig(bits=4),
}
WRONG = {
    "pq": {
        "block_size": [0, -4, 4.0, "4", None, True, [4], 10**9, 7],
        "n_centroids": [0, 1, -16, 16.0, "16", 10**9, 65_537, 10**400, 4_096],
        "codebook_bits": [12, 0, "8", 8.0, None, True],
        "n_iter": [0, -1, "20", 10**9],
        "row_scale": [0, 1, "yes", None],
        "bits": [4],  # of another scheme
    },
    "int": {
        "bits": [0, 9, -1, 8.0, "4", None, True, 10**10],
        "observer": ["min", 0, None, ["minmax"], "MINMAX"],
        "block_size": [4],
    },
}
WRONG["additive"] = WRONG["pq"]
OF_LAYER = {
    "scheme": ["pqq", None, 3, ["pq"], {}, "dense", "ipq"],
    "group": ["other", "", None, 0, ["ffn"], {}],
    "rows": [0, -1, "32", 32.0, None, True, 10**12],
    "columns": [0, -1, "64", 64.0, None, True, 10**12],
    "activation_bits": [0, -1, 9, 10**10, 8.0, "8", None, True],
    "tied_to": [None, 0, "", LAYER, "bert.pooler", "bert.encoder.layer.0.output", ["x"]],
    "colums": [64],
    "weight_shape": [[32, 64]],
    "__class__": ["x"],
}
CASES = [
    (kind, field, value)
    for kind in KINDS
    for field, values in {**WRONG[kind], **OF_LAYER}.items()
    for value in values
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a packed BERT, by kind of storage."""
    folder = tmp_path_factory.mktemp("saved")
    for kind, config in KINDS.items():
        quantize_model(make_model("bert"), config, progress=False).save_pretrained(folder / kind)
    return folder


@pytest.fixture
def stored(saved):
    """Return the quantization_config of a kind."""

    def read(kind):
        return json.loads((saved / kind / "config.json").read_text())["quantization_config"]

    return read


@pytest.mark.parametrize(("kind", "field", "value"), CASES)
def test_invalid_field_of_an_entry_is_named(kind, field, value, stored):
    values = stored(kind)
    values["plan"][LAYER][field] = value
    with pytest.raises(ValueError) as error:
        QuantizedModelConfig.from_dict(values)
    message = str(error.value)
    assert f"plan[{LAYER!r}]" in message and field in message
    assert repr(value)[:20] in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["scheme", "group", "rows", "columns"])
def test_missing_field_of_an_entry_is_named(kind, field, stored):
    values = stored(kind)
    del values["plan"][LAYER][field]
    with pytest.raises(ValueError, match=rf"plan\['{LAYER}'\]: {field} is missing"):
        QuantizedModelConfig.from_dict(values)


@pytest.mark.parametrize("plan", [None, [], "x", 1, {"a": None}, {"a": []}, {"a": "pq"}])
def test_plan_of_another_type_is_refused(plan, stored):
    with pytest.raises(ValueError, match="invalid plan"):
        QuantizedModelConfig.from_dict({**stored("pq"), "plan": plan})


def test_tied_entries_must_have_the_same_settings(tmp_path):
    model = quantize_model(make_model("gpt2"), KINDS["pq"], progress=False)
    values = model.config.quantization_config.to_dict()
    QuantizedModelConfig.from_dict(values)
    values["plan"]["lm_head"]["block_size"] = 8
    with pytest.raises(ValueError, match=r"plan\['lm_head'\]: tied_to='transformer.wte'.*settings"):
        QuantizedModelConfig.from_dict(values)


# ---- entry points --------------------------------------------------------------------------------

LOADERS = {
    "AutoQuantizedModel": AutoQuantizedModel.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification.from_pretrained,
    "the class": BertForSequenceClassification.from_pretrained,
    "with a config": lambda folder: BertForSequenceClassification.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder)
    ),
    "with a device map": lambda folder: AutoModel.from_pretrained(folder, device_map="cpu"),
    "settings": IPQConfig.from_pretrained,
}
EDITS = {
    "activation_bits": 10**10,
    "n_centroids": 10**9,
    "block_size": 0,
    "codebook_bits": 12,
    "group": ["ffn"],
    "rows": None,
}


@pytest.fixture
def damaged(saved, tmp_path):
    """Return a folder whose plan has another value in a field of one layer."""

    def damage(field, value):
        folder = shutil.copytree(saved / "pq", tmp_path / "damaged")
        edit_config(folder, lambda stored: stored["plan"][LAYER].update({field: value}))
        return folder

    return damage


@pytest.mark.parametrize("field", EDITS)
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_checks_entries_before_reading(loader, field, damaged, monkeypatch):
    folder = damaged(field, EDITS[field])
    if loader == "settings":
        shutil.move(folder / "config.json", folder / "model_config.json")
        stored = json.loads((folder / "model_config.json").read_text())["quantization_config"]
        (folder / IPQConfig.file_name).write_text(json.dumps(stored))
    allocated = []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocated.append(args))
    with pytest.raises(ValueError, match=rf"plan\['{LAYER}'\].*{field}"):
        LOADERS[loader](folder)
    assert not allocated


@pytest.mark.parametrize("field", EDITS)
def test_report_checks_entries(field, damaged, capsys):
    folder = damaged(field, EDITS[field])
    assert main(["report", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert not out and f"plan[{LAYER!r}]" in err and field in err


@pytest.mark.parametrize("field", ["scheme", "x" * 10**6, "n_centroids", "tied_to"])
def test_errors_about_long_values_are_short(field, stored):
    values = stored("pq")
    values["plan"][LAYER][field] = "pq" * 10**6
    with pytest.raises(ValueError, match=r"plan\['bert") as error:
        QuantizedModelConfig.from_dict(values)
    assert len(str(error.value)) < 700
