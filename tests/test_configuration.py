"""Configs: JSON round trips, strict validation, errors that name field, value and way out."""

import json

import pytest

from hf_quantnoise import FixedPointConfig, IPQConfig, QuantNoiseConfig
from hf_quantnoise.configuration import FORMAT_VERSION, QuantizedModelConfig


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"p": 1.5}, ["p=1.5", "0 to 1"]),
        ({"p": -0.1}, ["p=-0.1", "0 to 1"]),
        ({"p": float("nan")}, ["p=nan", "0 to 1"]),
        ({"p": "half"}, ["p='half'", "0 to 1"]),
        ({"p": True}, ["p=True"]),
        ({"noise": "proxi"}, ["noise", "'proxi'", "Did you mean 'proxy'"]),
        ({"noise": "int9"}, ["'int9'", "int8"]),
        ({"noise": []}, ["noise=[]"]),
        ({"noise": ["pq", "int8"], "p": [0.1]}, ["p=[0.1]", "1 rates for 2 noises"]),
        ({"block_size": 0}, ["block_size=0", "an integer from 1"]),
        ({"block_size": {}}, ["block_size={}", "empty"]),
        ({"block_size": {"ffn": 8, "attention": -4}}, ["-4", "'attention'"]),
        ({"block_size": {"ff(": 8}}, ["'ff('", "regular expression"]),
        ({"n_centroids": 1}, ["n_centroids=1", "2 to 65536"]),
        ({"codebook_update": "day"}, ["codebook_update='day'", "'epoch'"]),
        ({"codebook_update": 0}, ["codebook_update=0"]),
        ({"p_schedule": "cosine"}, ["p_schedule='cosine'", "'constant'", "steps"]),
        ({"p_schedule": 0}, ["p_schedule=0"]),
        ({"scale_update_steps": 0}, ["scale_update_steps=0"]),
        ({"target_modules": 3}, ["target_modules=3", "regex"]),
        ({"exclude_modules": "["}, ["exclude_modules", "regular expression"]),
        ({"seed": -1}, ["seed=-1"]),
    ],
)
def test_bad_noise_configs_are_refused(fields, words):
    with pytest.raises(ValueError) as error:
        QuantNoiseConfig(**fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_size": 2.5}, ["block_size=2.5"]),
        ({"n_centroids": 100_000}, ["n_centroids=100000", "65536"]),
        ({"codebook_bits": 4}, ["codebook_bits=4", "32, 16, 8"]),
        ({"stages": "ffn"}, ["stages='ffn'", "list"]),
        ({"stages": []}, ["stages=[]"]),
        ({"stages": ["ffn", "ffn"]}, ["twice"]),
        ({"block_size": {"ffn": 8}}, ["block_size", "'embeddings'", "stages"]),
        ({"format_version": FORMAT_VERSION + 1}, ["newer", "pip install -U"]),
        ({"format_version": 0}, ["format_version=0"]),
        ({"target_size_mb": 0}, ["target_size_mb=0", "above 0"]),
        ({"target_size_mb": "14 MB"}, ["target_size_mb='14 MB'", "number"]),
        ({"target_size_mb": float("inf")}, ["target_size_mb=inf"]),
        ({"target_bits_per_weight": -1.5}, ["target_bits_per_weight=-1.5"]),
        ({"target_bits_per_weight": True}, ["target_bits_per_weight=True"]),
        ({"target_size_mb": 14, "target_bits_per_weight": 2}, ["both", "one of them"]),
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
def test_bad_ipq_configs_are_refused(fields, words):
    with pytest.raises(ValueError) as error:
        IPQConfig(**fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("bits", [0, 9, "4", 3.0])
def test_fixed_point_takes_1_to_8_bits(bits):
    with pytest.raises(ValueError, match="bits="):
        FixedPointConfig(bits=bits)


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


def test_noise_config_says_what_is_missing_or_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match="quant_noise_config.json is missing"):
        QuantNoiseConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no field 'rate'; fields: noise, p,"):
        QuantNoiseConfig.from_dict({"rate": 0.1})


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


def test_a_future_format_with_new_fields_is_called_newer_not_odd():
    values = {**IPQConfig().to_dict(), "format_version": 99, "hologram": True}
    with pytest.raises(ValueError, match="format_version=99.*newer.*pip install -U"):
        QuantizedModelConfig.from_dict(values)
    with pytest.raises(ValueError, match="no field 'hologram'"):
        QuantizedModelConfig.from_dict({**values, "format_version": 1})
    with pytest.raises(ValueError, match="unknown scheme 'pqq'"):
        QuantizedModelConfig.from_dict({"scheme": "pqq"})


def test_matching_noise_has_the_blocks_of_its_target():
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
    with pytest.raises(ValueError, match="prune_layers.*block_size"):
        QuantNoiseConfig.matching(IPQConfig(layer_quantizers=layers, prune_layers="every_other"))


def test_what_a_plan_says_of_the_layer_is_no_setting_of_its_quantizer():
    entry = {"scheme": "int", "bits": 4, "observer": "minmax"}
    described = {**entry, "group": "ffn", "rows": 4, "columns": 4, "tied_to": "b"}
    assert IPQConfig(layer_quantizers={"a": described}).layer_quantizers == {"a": entry}
