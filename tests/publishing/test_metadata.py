"""Metadata of model cards: valid on the Hub, facts of the base model, results of a dataset."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from golden.make import HERE as GOLDEN
from huggingface_hub import ModelCard
from publishing.test_card import FULL
from support.hub_metadata import metadata_problems
from support.tiny import make_model

from hf_quantnoise import AutoQuantizedModel, QuantNoiseCard, write_model_card

BASE = (
    "---\nlicense: other\nlicense_name: my-own\nlanguage: [en, fr]\nlibrary_name: timm\n---\nText."
)
RESULT = {
    "task": {"type": "text-classification"},
    "dataset": {"type": "nyu-mll/glue", "name": "GLUE"},
    "metrics": [{"type": "accuracy", "value": 0.5}],
}
# Metadata that the Hub rejects -> its complaint.
INVALID = {
    '"base_model" with value "/home/me/bert"': {"base_model": "/home/me/bert"},
    '"license" with value "my own"': {"license": "my own"},
    '"language" with value "English"': {"language": ["en", "English"]},
    '"pipeline_tag" with value "sentiment"': {"pipeline_tag": "sentiment"},
    '"model-index[0].results[0].dataset" is required': {
        "model-index": [{"name": "m", "results": [{**RESULT, "dataset": None}]}]
    },
    '"model-index[0].results[0].metrics.value" is required': {
        "model-index": [{"name": "m", "results": [{**RESULT, "metrics": [{"type": "f1"}]}]}]
    },
    '"model-index[0].name" is required': {"model-index": [{"results": [RESULT]}]},
    "must be a finite number": {
        "model-index": [
            {
                "name": "m",
                "results": [{**RESULT, "metrics": [{"type": "f", "value": float("nan")}]}],
            }
        ]
    },
}


def card_text(values):
    import yaml

    return f"---\n{yaml.safe_dump(values)}---\n"


@pytest.fixture
def packed():
    return AutoQuantizedModel.from_pretrained(GOLDEN / "shared")


@pytest.mark.parametrize("complaint", INVALID)
def test_checks_of_the_local_hub_reject_invalid_metadata(complaint):
    errors, _ = metadata_problems(card_text(INVALID[complaint]))
    assert len(errors) == 1 and complaint in errors[0]
    assert metadata_problems(card_text({"model-index": [{"name": "m", "results": [RESULT]}]})) == (
        [], [],
    )  # fmt: skip
    assert metadata_problems("# No metadata")[1]


def test_metadata_are_valid_and_survive_a_round_trip(packed, tmp_path):
    infinite = {**FULL.after, "eval_perplexity": float("inf")}
    cards = {
        "full": replace(FULL, dataset_config="sst2", dataset_split="validation", after=infinite),
        "without id": QuantNoiseCard(dataset="GLUE SST-2", after={"accuracy": 0.5}),
        "empty": QuantNoiseCard(),
    }
    for name, card in cards.items():
        rendered = card.render(packed)
        assert metadata_problems(str(rendered)) == ([], []), name
        rendered.save(tmp_path / "README.md")
        loaded = ModelCard.load(tmp_path / "README.md")
        assert loaded.data.to_dict() == rendered.data.to_dict() and str(loaded) == str(rendered)
    dense = replace(FULL, noise=None).render(make_model("bert"))
    assert metadata_problems(str(dense)) == ([], [])


def test_scalars_of_numpy_and_torch_are_metrics(packed, tmp_path):
    """scikit-learn and evaluate return numpy's; YAML stores them as objects, which are rejected."""
    scores = {"f1": np.float64(0.5), "recall": np.float32(0.25), "exact": torch.tensor(0.75)}
    path = write_model_card(packed, tmp_path, QuantNoiseCard(before=scores, after=scores))
    results = ModelCard.load(path).data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == {
        "f1": 0.5, "recall": 0.25, "exact": 0.75,
    }  # fmt: skip
    assert "| exact | 0.7500 | 0.7500 |" in (tmp_path / "README.md").read_text()


def test_results_name_configuration_and_split(packed):
    card = replace(FULL, dataset_config="sst2", dataset_split="validation").render(packed)
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("nyu-mll/glue", "GLUE SST-2")
    assert (result.dataset_config, result.dataset_split) == ("sst2", "validation")
    assert r"Measured on GLUE SST-2 (validation)." in card.text


def test_license_and_languages_are_those_of_the_base_model(packed, tmp_path, monkeypatch):
    expected = {"license": "other", "license_name": "my-own", "language": ["en", "fr"]}
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(BASE)
    packed.name_or_path = str(base)
    local = QuantNoiseCard().render(packed).data.to_dict()
    assert {name: local.get(name) for name in expected} == expected
    assert local["library_name"] == "hf-quantnoise" and "base_model" not in local
    # The card of a repository that was downloaded before.
    monkeypatch.setattr(
        "hf_quantnoise.publishing.metadata.try_to_load_from_cache",
        lambda name, file: str(base / file) if name == "me/base" else None,
    )
    cached = QuantNoiseCard(base_model="me/base").render(packed).data.to_dict()
    assert {name: cached.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    "text", [None, "No metadata.", "---\nlicense: [1\n---\n", "---\nlicense: 3\n---\n"]
)
def test_unknown_license_is_omitted(text, packed, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    packed.name_or_path = str(tmp_path)
    for base in (None, "me/unreachable"):
        data = QuantNoiseCard(base_model=base).render(packed).data.to_dict()
        assert not {"license", "language"} & data.keys()


def test_license_in_an_existing_card_is_kept(packed, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(BASE)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    packed.name_or_path = str(tmp_path / "base")
    data = ModelCard.load(write_model_card(packed, tmp_path)).data
    assert data.license == "mit" and data.language == ["en", "fr"]


def test_norwegian_and_files_of_windows_are_read(packed, tmp_path):
    """YAML 1.1 reads the code of Norwegian as False, which the Hub rejects; Notepad adds a BOM."""
    (tmp_path / "README.md").write_text(
        "\ufeff---\nlanguage: [no, en]\nlicense: mit\n---\nText.", "utf-8"
    )
    card = ModelCard.load(write_model_card(packed, tmp_path))
    assert (card.data.language, card.data.license) == (["no", "en"], "mit")
    assert metadata_problems(str(card)) == ([], [])


@pytest.mark.parametrize("content", [b"---\nlicense: [mit\n---\n", b"---\n- a\n---\n", b"caf\xe9"])
def test_invalid_existing_card_is_named(content, packed, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=r"invalid model card '.*README\.md': .*; correct its"):
        write_model_card(packed, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content


@pytest.mark.parametrize(
    ("existing", "expected"),
    [("transformers", "hf-quantnoise"), ("hf-quantnoise", "hf-quantnoise"), ("setfit", "setfit")],
)
def test_library_of_transformers_cards_is_replaced(existing, expected, packed, tmp_path):
    """The code that the Hub shows for transformers lacks the import, and fails."""
    (tmp_path / "README.md").write_text(f"---\nlibrary_name: {existing}\n---\nText.")
    assert ModelCard.load(write_model_card(packed, tmp_path)).data.library_name == expected
    packed.dequantize()
    data = ModelCard.load(write_model_card(packed, tmp_path)).data
    assert data.library_name == ("setfit" if existing == "setfit" else "transformers")
