"""Regexes and layer names of a config: compiled when they are used, checked in linear time."""

import json
import re
import time

import pytest
import torch
from support.stored import STORED
from support.tiny import make_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
)
from hf_quantnoise.cli import main
from hf_quantnoise.configuration import QuantizedModelConfig
from hf_quantnoise.configuration.checks import layer_chunks
from hf_quantnoise.files.reading import MAX_ENTRIES, MAX_NAME_LENGTH
from hf_quantnoise.modeling.structural_changes import declare_shared

INVALID = {
    "unbalanced": "(",
    "overflow": "a{99999999999}",
    "deep": "(" * 5_000 + ")" * 5_000,
}
# class -> its fields that hold regexes, each with the value for a regex
FIELDS = {
    FixedPointConfig: {
        "target_modules": str,
        "exclude_modules": str,
        "prune_layers": str,
    },
    IPQConfig: {
        "target_modules": str,
        "block_size": lambda regex: {regex: 4},
        "n_centroids": lambda regex: {regex: 4},
        "stages": lambda regex: [regex],
    },
    QuantNoiseConfig: {
        "target_modules": str,
        "exclude_modules": str,
        "block_size": lambda regex: {regex: 4},
        "n_centroids": lambda regex: {regex: 4},
    },
}
CASES = [(cls, field) for cls, fields in FIELDS.items() for field in fields]


@pytest.fixture
def compiled(monkeypatch):
    """The patterns that are compiled in a test."""
    patterns = []
    original = re.compile

    def spy(pattern, *flags):
        patterns.append(pattern)
        return original(pattern, *flags)

    monkeypatch.setattr(re, "compile", spy)
    return patterns


@pytest.mark.parametrize("value", INVALID.values(), ids=INVALID)
@pytest.mark.parametrize(("cls", "field"), CASES)
def test_config_of_user_rejects_invalid_regex(cls, field, value):
    with pytest.raises(ValueError, match=rf"^invalid {field}=.*expected a regular expr") as error:
        cls(**{field: FIELDS[cls][field](value)})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("cls", "field"), CASES)
def test_config_of_file_compiles_no_regex(cls, field, compiled):
    value = FIELDS[cls][field](INVALID["deep"])
    config = cls.from_dict({**cls().to_dict(), field: value})
    assert getattr(config, field) == value
    assert INVALID["deep"] not in compiled


@pytest.mark.parametrize("value", INVALID.values(), ids=INVALID)
@pytest.mark.parametrize(("cls", "field"), CASES)
def test_regex_of_file_is_checked_when_used(cls, field, value):
    config = cls.from_dict({**cls().to_dict(), field: FIELDS[cls][field](value)})
    model = make_model("bert")
    if field == "n_centroids" and cls is QuantNoiseConfig:
        config.noise = "pq"
    name = "key of block_size or n_centroids" if isinstance(getattr(config, field), dict) else field
    with pytest.raises(ValueError, match=f"invalid ({field}|{name})=.*expected a regular expr"):
        if cls is QuantNoiseConfig:
            apply_quant_noise(model, config)
        else:
            quantize_model(model, config, progress=False)


def test_packed_model_loads_without_compiling_its_regexes(tmp_path, compiled, capsys):
    model = quantize_model(make_model("bert"), STORED["ipq"], progress=False)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for field, value_of in FIELDS[IPQConfig].items():
        stored["quantization_config"][field] = value_of(INVALID["deep"])
    (tmp_path / "config.json").write_text(json.dumps(stored))
    again = AutoQuantizedModel.from_pretrained(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "note:" not in capsys.readouterr().err
    again.save_pretrained(tmp_path / "again")
    assert INVALID["deep"] not in compiled
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


class CountedName(str):
    """A name that counts how often it is compared."""

    compared = 0
    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountedName.compared += 1
        return str.__eq__(self, other)


def test_layer_chunks_compares_each_name_a_few_times():
    names = [CountedName(f"blocks.{number}") for number in range(40_000)]
    layer_chunks("share_layers", [names])
    assert CountedName.compared < 3 * len(names)


def test_layer_chunks_names_a_repeated_layer():
    with pytest.raises(ValueError, match=r"share_layers=.*'b' is listed more than once") as error:
        layer_chunks("share_layers", [["a", "b"], ["b", *(f"c.{n}" for n in range(1_000))]])
    assert len(str(error.value)) < 400


class _Config(PreTrainedConfig):
    model_type = "many_layers"


class _ManyLayers(PreTrainedModel):
    config_class = _Config

    def __init__(self, config, n_layers):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(n_layers))
        self.post_init()


def test_declare_shared_is_linear_in_the_number_of_layers():
    """Twice declared, so that there are ties to be replaced: 16 times as long if quadratic."""
    seconds = []
    for n_layers in (1_000, 4_000):
        with torch.device("meta"):
            model = _ManyLayers(_Config(), n_layers)
        shared = {f"layers.{n}": "layers.0" for n in range(1, n_layers)}
        times = []
        for _ in range(3):
            start = time.process_time()
            declare_shared(model, shared)
            times.append(time.process_time() - start)
        seconds.append(min(times))
        assert len(model.all_tied_weights_keys) == 2 * (n_layers - 1)
    assert seconds[1] < 9 * seconds[0]


LONG = "a" * (MAX_NAME_LENGTH + 1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("share_layers", [[LONG]], "invalid share_layers='aaa.*1,000 characters"),
        ("left_dense", {LONG: "reason"}, "invalid left_dense='aaa.*1,000 characters"),
        ("left_dense", {"a": 1}, r"invalid left_dense\['a'\]=1: expected a reason"),
        ("left_dense", ["a"], r"invalid left_dense=\['a'\]: expected a dict"),
        ("shared_layers", {"a": None}, r"invalid shared_layers\['a'\]=None"),
        ("shared_layers", {"a": LONG}, r"invalid shared_layers\['a'\]='aaa.*1,000 characters"),
        ("pruned_layers", {"a": -1}, r"invalid pruned_layers\['a'\]=-1"),
        ("pruned_layers", {"a": 1e400}, r"invalid pruned_layers\['a'\]=inf"),
        ("target_modules", [LONG], "invalid target_modules='aaa.*1,000 characters"),
    ],
)
def test_names_and_entries_of_a_file_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        QuantizedModelConfig.from_dict({**IPQConfig().to_dict(), field: value})
    assert len(str(error.value)) < 400


def test_number_of_entries_of_a_file_is_limited():
    names = [f"a.{number}" for number in range(MAX_ENTRIES + 1)]
    for field, value in (("share_layers", [names]), ("left_dense", dict.fromkeys(names, "x"))):
        with pytest.raises(ValueError, match=f"invalid {field}: expected up to 200,000 names"):
            QuantizedModelConfig.from_dict({**IPQConfig().to_dict(), field: value})
    plan = dict.fromkeys(names[:25_001])
    with pytest.raises(ValueError, match="plan: got 25,001 entries, expected up to 25,000"):
        QuantizedModelConfig.from_dict({**IPQConfig().to_dict(), "plan": plan})
