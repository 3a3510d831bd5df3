"""``QuantNoiseConfig.matching(config, model)``: noise on the layers that compression packs."""

import copy
from dataclasses import replace

import pytest
from support.tiny import make_model, make_vision_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_quantnoise import FixedPointConfig, IPQConfig, QuantNoiseConfig, quantize_model
from hf_quantnoise.noise import noised_layers

SMALL = IPQConfig(n_centroids=16)


class Suffixes(PreTrainedModel):
    """The name of a layer that is too small to be packed is the end of others' names."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.proj = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(64, 64)}) for _ in range(2))
        self.post_init()


MODELS = {
    **{name: lambda name=name: make_model(name) for name in ("bert", "bert-mlm", "gpt2")},
    "resnet": lambda: make_vision_model("resnet"),
    "suffixes": lambda: Suffixes(PreTrainedConfig()),
}
NAMED = {
    "bert.encoder.layer.0.output.dense": {"scheme": "dense"},
    "bert.encoder.layer.1.output.dense": {"scheme": "pq", "block_size": 8, "n_centroids": 8},
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert", replace(SMALL, stages=[".*"])),  # the classifier is too small
        ("bert", replace(SMALL, n_centroids=200)),  # so are most layers
        ("bert", replace(SMALL, block_size={"ffn": 8, "attention": 4}, stages=["ffn"])),
        ("bert", replace(SMALL, target_modules=["dense", "query"], exclude_modules=["query"])),
        ("bert", replace(SMALL, layer_quantizers=NAMED)),
        ("bert-mlm", replace(SMALL, row_scale=True)),
        ("gpt2", replace(SMALL, n_codebooks=2)),
        ("resnet", replace(SMALL, n_centroids=64)),
        ("suffixes", replace(SMALL, stages=[".*"])),
        ("suffixes", FixedPointConfig(bits=8, observer="channel")),
        ("bert", FixedPointConfig(bits=4, exclude_modules=["classifier"])),
    ],
)
def test_noise_is_on_the_layers_that_compression_packs(name, config):
    model = MODELS[name]()
    kind = "int8" if isinstance(config, FixedPointConfig) else "pq"
    noise = QuantNoiseConfig.matching(config, model, noise=kind)
    assert QuantNoiseConfig.from_dict(noise.to_dict()) == noise
    packed = quantize_model(copy.deepcopy(model), replace(config, leftover_bits=32))
    assert sorted(noised_layers(model, noise)) == sorted(packed.config.quantization_config.plan)
    # The same layers for a noise that has no blocks.
    single = QuantNoiseConfig.matching(config, model, noise="int8")
    assert noised_layers(model, single) == noised_layers(model, noise)


@pytest.mark.parametrize("kind", ["pq", "proxy"])
def test_layers_that_are_stored_in_integers_have_no_noise_of_blocks(kind):
    """Bit allocation gives the most sensitive weights more bits than blocks of 2 have."""
    name = "bert.encoder.layer.0.output.dense"
    model = make_model("bert")
    config = replace(SMALL, layer_quantizers={name: {"scheme": "int", "bits": 6}})
    without = noised_layers(model, QuantNoiseConfig.matching(SMALL, model, noise=kind))
    noised = noised_layers(model, QuantNoiseConfig.matching(config, model, noise=kind))
    assert name in without
    assert set(without) - set(noised) == {name}


def test_target_size_must_be_allocated_before_it_is_matched():
    model = make_model("bert")
    for arguments in [(), (model,)]:
        with pytest.raises(ValueError, match=r"cannot match target_size_mb=0.05.*allocate_bits"):
            QuantNoiseConfig.matching(IPQConfig(target_size_mb=0.05), *arguments)


def test_own_selection_is_added_to_what_storage_leaves_out():
    model = make_model("bert")
    target = IPQConfig(block_size=8, n_centroids=16, stages=["ffn", "attention"])
    stored = set(noised_layers(model, QuantNoiseConfig.matching(target, model, noise="pq")))
    queries = {name for name in stored if name.endswith("query")}
    assert queries and not any("embeddings" in name for name in stored)
    for own, expected in (
        ({"exclude_modules": ["query"]}, stored - queries),
        ({"exclude_modules": ".*embeddings.*|.*query"}, stored - queries),
        ({"target_modules": ".*query|.*embeddings"}, queries),
        ({"target_modules": ["query", "key"], "exclude_modules": ["key"]}, queries),
    ):
        noise = QuantNoiseConfig.matching(target, model, noise="pq", **own)
        assert set(noised_layers(model, noise)) == expected
    with pytest.raises(ValueError, match="exclude_modules='typo' matches no layer"):
        QuantNoiseConfig.matching(target, model, exclude_modules="typo")
    with pytest.raises(ValueError, match="invalid exclude_modules=5"):
        QuantNoiseConfig.matching(target, model, exclude_modules=5)
