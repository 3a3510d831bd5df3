"""Configs: JSON round trips, strict checks, and errors that name field and value."""

import json
import logging
import runpy
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from transformers import HfArgumentParser

from hf_quantnoise import CompressionArguments, FixedPointConfig, IPQConfig, QuantNoiseConfig
from hf_quantnoise.configuration import FORMAT_VERSION, QuantizedModelConfig
from hf_quantnoise.configuration.flags import FORMS, QuantizationFlags
from hf_quantnoise.configuration.options import option, options_of, values_of_file

DOCS = Path(__file__).parents[1] / "docs"
CONFIGS = [QuantNoiseConfig, IPQConfig, FixedPointConfig, CompressionArguments]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"p": 1.5}, ["p=1.5", "0 to 1"]),
        ({"p": -0.1}, ["p=-0.1"]),
        ({"p": float("nan")}, ["p=nan"]),
        ({"p": "half"}, ["p='half'"]),
        ({"p": True}, ["p=True"]),
        ({"noise": "proxi"}, ["noise", "'proxi'", "did you mean 'proxy'"]),
        ({"noise": "int9"}, ["'int9'", "int8"]),
        ({"noise": []}, ["noise=[]"]),
        ({"noise": {"proxy": 0.1}}, ["noise={'proxy': 0.1}"]),
        ({"noise": ["pq", "int8"], "p": [0.1]}, ["p=[0.1]", "1 rates for 2 noises"]),
        ({"block_size": 0}, ["block_size=0", "an integer from 1"]),
        ({"block_size": {}}, ["block_size={}", "empty"]),
        ({"block_size": {"ffn": 8, "attention": -4}}, ["block_size['attention']=-4"]),
        ({"block_size": {"ff(": 8}}, ["'ff('", "regular expression"]),
        ({"n_centroids": 1}, ["n_centroids=1", "2 to 65536"]),
        ({"codebook_update": "day"}, ["codebook_update='day'", "'epoch'"]),
        ({"codebook_update": 0}, ["codebook_update=0"]),
        ({"p_schedule": "cosine"}, ["p_schedule='cosine'", "'constant'", "steps"]),
        ({"p_schedule": 0}, ["p_schedule=0"]),
        ({"scale_update_steps": 0}, ["scale_update_steps=0"]),
        ({"target_modules": 3}, ["target_modules=3", "regex"]),
        ({"exclude_modules": "["}, ["exclude_modules='['", "regular expression"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"layerdrop_ste": 1}, ["layerdrop_ste=1", "True or False"]),
        ({"p": 10**400}, ["p=1000", "from 0 to 1"]),
        ({"share_layers": [["a", "b"], "cd"]}, ["share_layers", "list of lists"]),
    ],
)
def test_noise_config_checks(values, words):
    with pytest.raises(ValueError) as error:
        QuantNoiseConfig(**values)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"block_size": 2.5}, ["block_size=2.5"]),
        ({"n_centroids": 100_000}, ["n_centroids=100000", "65536"]),
        ({"codebook_bits": 4}, ["codebook_bits=4", "32, 16, 8"]),
        ({"stages": "ffn"}, ["stages='ffn'", "list"]),
        ({"stages": []}, ["stages=[]"]),
        ({"stages": 3}, ["stages=3"]),
        ({"stages": ["ffn", "ffn"]}, ["stages=['ffn', 'ffn']", "twice"]),
        (
            {"block_size": {"ffn": 8}, "stages": ["ffn", "embeddings"]},
            ["block_size", "'embeddings'", "stages"],
        ),
        ({"format_version": FORMAT_VERSION + 1}, ["newer", "pip install -U"]),
        ({"format_version": 0}, ["format_version=0"]),
        ({"target_size_mb": 0}, ["target_size_mb=0", "above 0"]),
        ({"target_size_mb": "14 MB"}, ["target_size_mb='14 MB'", "number"]),
        ({"target_size_mb": float("inf")}, ["target_size_mb=inf"]),
        ({"target_bits_per_weight": -1.5}, ["target_bits_per_weight=-1.5"]),
        ({"target_bits_per_weight": True}, ["target_bits_per_weight=True"]),
        (
            {"target_size_mb": 14, "target_bits_per_weight": 2},
            ["target_size_mb=14", "target_bits_per_weight=2"],
        ),
        ({"target_size_mb": 14, "n_codebooks": 2}, ["n_codebooks=2", "target_size_mb=14"]),
        ({"layer_quantizers": [1]}, ["layer_quantizers=[1]", "dict from layer name"]),
        ({"layer_quantizers": {"a": "int4"}}, ["layer_quantizers['a']='int4'", "scheme"]),
        ({"layer_quantizers": {"a": {"bits": 4}}}, ["layer_quantizers['a']", '"scheme"']),
        ({"layer_quantizers": {"a": {"scheme": "int", "bits": 9}}}, ["['a']: bits=9", "1 to 8"]),
        ({"layer_quantizers": {"a": {"scheme": "pq", "block_size": 0}}}, ["['a']: block_size=0"]),
        ({"layer_quantizers": {"a": {"scheme": "pq", "n_centroids": 1}}}, ["n_centroids=1"]),
        ({"layer_quantizers": {"a": {"scheme": "pq", "codebook_bits": 4}}}, ["codebook_bits=4"]),
        ({"layer_quantizers": {"a": {"scheme": "pq", "n_iter": 0}}}, ["n_iter=0"]),
    ],
)
def test_ipq_config_checks(values, words):
    with pytest.raises(ValueError) as error:
        IPQConfig(**values)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("bits", [0, 9, "4", 3.0])
def test_fixed_point_config_checks(bits):
    with pytest.raises(ValueError, match=f"bits={bits!r}"):
        FixedPointConfig(bits=bits)


# ---- one declaration per option ------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_options_have_help_and_valid_defaults(config):
    made = config()
    for name, declared in options_of(config).items():
        assert declared.help.endswith("."), name
        assert getattr(made, name) == declared.default
        assert f"{name}: {declared.help}" in config.__doc__
    assert list(signature(config).parameters) == list(options_of(config))


def test_configuration_page_is_up_to_date():
    made = runpy.run_path(str(DOCS / "write_configuration.py"))["page"]()
    page = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert made.splitlines() == page.splitlines(), "run python docs/write_configuration.py"


def test_flags_have_the_defaults_of_the_configs():
    flags = {name: flag.default for name, flag in options_of(QuantizationFlags).items()}
    for config in (IPQConfig, FixedPointConfig):
        for name, declared in options_of(config).items():
            if name in flags and name not in ("bits", "layer_quantizers"):
                assert flags[name] == declared.default
        values = QuantizationFlags(scheme=config.scheme).config(seed=0)
        assert values == config()


def test_every_option_can_be_written_on_a_command_line():
    """A new type of option needs an entry in FORMS."""
    simple = {int, float, bool, str, int | None, float | None, str | None}
    for config in (QuantNoiseConfig, IPQConfig, FixedPointConfig):
        for name, declared in options_of(config).items():
            if not name.endswith("_layers") and name not in ("plan", "left_dense", "importance"):
                assert declared.type in simple or declared.type in FORMS, name


def test_an_option_of_a_subclass_becomes_a_keyword_and_a_flag():
    from dataclasses import dataclass
    from typing import Annotated

    from hf_quantnoise.configuration.checks import integer

    @dataclass
    class More(CompressionArguments):
        patience: Annotated[int, integer(1, 3)] = option(2, "Stages without improvement.")

    (parsed,) = HfArgumentParser(More).parse_args_into_dataclasses(["--patience", "3"])
    assert parsed.patience == 3
    with pytest.raises(ValueError, match="patience=4"):
        More(patience=4)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name", "meant"),
    [
        (QuantNoiseConfig, "blok_size", "block_size"),
        (IPQConfig, "codebok_bits", "codebook_bits"),
        (FixedPointConfig, "bit", "bits"),
        (CompressionArguments, "stage_epoch", "stage_epochs"),
    ],
)
def test_unknown_names_are_errors_with_a_suggestion(config, name, meant, tmp_path):
    with pytest.raises(TypeError, match=f"{config.__name__}.*{name!r}; did you mean {meant!r}"):
        config(**{name: 4})
    words = f"unknown field {name!r} of {config.__name__}.*did you mean {meant!r}"
    with pytest.raises(ValueError, match=words):
        values_of_file(config, {name: 4})
    if config is not CompressionArguments:
        scheme = {} if config is QuantNoiseConfig else {"scheme": config.scheme}
        (tmp_path / config.file_name).write_text(json.dumps({name: 4, **scheme}))
        with pytest.raises(ValueError, match=words):
            config.from_pretrained(tmp_path)


def test_names_unlike_any_option_get_the_list():
    with pytest.raises(ValueError, match=r"'hologram'.*known: noise, p,"):
        QuantNoiseConfig.from_dict({"hologram": 0.1})


@pytest.mark.parametrize("name", CompressionArguments.removed)
def test_removed_options_in_files_are_dropped_with_a_warning(name, caplog):
    with caplog.at_level(logging.WARNING):
        values = values_of_file(CompressionArguments, {name: 3, "stage_epochs": 2})
    assert values == {"stage_epochs": 2}
    assert f"{name} was removed and has no effect" in caplog.text
    with pytest.raises(TypeError, match=f"{name!r} .removed: "):
        CompressionArguments(**{name: 3})


# ---- files ---------------------------------------------------------------------------------------


def test_noise_config_round_trip(tmp_path):
    config = QuantNoiseConfig(
        noise=["pq", "int4"],
        p=[0.1, 0.5],
        block_size={"ffn": 8, r".*query": 4},
        target_modules=["query", "dense"],
        codebook_update=50,
    )
    config.save_pretrained(tmp_path / "new" / "folder")
    assert QuantNoiseConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert QuantNoiseConfig.from_dict(json.loads(config.to_json_string())) == config
    assert config.noises == [("pq", 0.1), ("int4", 0.5)]


def test_configs_with_values_of_numpy_can_be_saved(tmp_path):
    rates = list(np.array([0.25, 0.5], dtype=np.float32))
    noise = QuantNoiseConfig(noise=["pq", "int8"], p=rates, scale_update_steps=np.int64(5))
    storage = IPQConfig(block_size=np.int32(8), target_size_mb=np.float16(2.5))
    for config in (noise, storage):
        config.save_pretrained(tmp_path)
        assert type(config).from_pretrained(tmp_path) == config
    assert (noise.p, noise.scale_update_steps, storage.block_size) == ([0.25, 0.5], 5, 8)


def test_noise_config_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"quant_noise_config.json is missing"):
        QuantNoiseConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        IPQConfig(),
        IPQConfig(block_size={"ffn": 8, "embeddings": 8, "attention": 4}, codebook_bits=16),
        FixedPointConfig(bits=4, exclude_modules=["classifier"]),
        IPQConfig(target_bits_per_weight=1.5),
        IPQConfig(
            target_size_mb=14,
            layer_quantizers={
                "a": {"scheme": "pq", "block_size": 8, "n_centroids": 64},
                "b": {"scheme": "int", "bits": 4, "observer": "channel"},
                "c": {"scheme": "dense"},
            },
        ),
    ],
)
def test_storage_configs_round_trip_through_json(config):
    values = json.loads(config.to_json_string())
    assert values["quant_method"] == "hf_quantnoise"
    assert values["format_version"] == FORMAT_VERSION
    again = QuantizedModelConfig.from_dict(values)
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()


def test_newer_formats_are_reported_before_unknown_fields():
    values = {**IPQConfig().to_dict(), "format_version": 99, "hologram": True}
    with pytest.raises(ValueError, match=r"format_version=99.*newer.*pip install -U"):
        QuantizedModelConfig.from_dict(values)
    with pytest.raises(ValueError, match="unknown field 'hologram'"):
        QuantizedModelConfig.from_dict({**values, "format_version": 1})
    with pytest.raises(ValueError, match="unknown scheme 'pqq'"):
        QuantizedModelConfig.from_dict({"scheme": "pqq"})


def test_matching_noise_has_the_blocks_of_the_target():
    blocks = {"ffn": 8, "embeddings": 8, "attention": 4}
    noise = QuantNoiseConfig.matching(IPQConfig(block_size=blocks, n_centroids=64), p=0.2)
    assert (noise.noise, noise.p) == ("proxy", 0.2)
    assert (noise.block_size, noise.n_centroids) == (blocks, 64)
    exact = QuantNoiseConfig.matching(IPQConfig(), noise="pq")
    assert exact.noise == "pq"
    assert QuantNoiseConfig.matching(FixedPointConfig(bits=4)).noise == "int4"


def test_matching_noise_has_the_blocks_of_single_layers():
    layers = {
        "a.0": {"scheme": "pq", "block_size": 8, "n_centroids": 64},
        "a.1": {"scheme": "int", "bits": 4},
    }
    noise = QuantNoiseConfig.matching(IPQConfig(layer_quantizers=layers))
    assert noise.block_size[r"a\.0"] == 8 and noise.n_centroids[r"a\.0"] == 64
    assert noise.block_size["ffn"] == noise.block_size["head"] == 4
    assert r"a\.1" not in noise.block_size
    with pytest.raises(ValueError, match=r"prune_layers.*block_size"):
        QuantNoiseConfig.matching(IPQConfig(layer_quantizers=layers, prune_layers="every_other"))


def test_layer_quantizers_drop_the_description_of_a_plan():
    entry = {"scheme": "int", "bits": 4, "observer": "minmax"}
    described = {**entry, "group": "ffn", "rows": 4, "columns": 4, "tied_to": "b"}
    assert IPQConfig(layer_quantizers={"a": described}).layer_quantizers == {"a": entry}
