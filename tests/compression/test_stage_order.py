"""Stages are any groups and patterns, each with its own blocks; layers are packed bottom-up."""

import re

import pytest
import torch
from support.stacked import inputs_of, make_stacked
from support.tiny import make_model
from support.trainers import make_trainer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import CompressionArguments, IPQConfig, quantize_model
from hf_quantnoise.modeling import packed_layers, packer
from hf_quantnoise.modeling.packer import ModelPacker

FIRST, SECOND = r"bert\.encoder\.layer\.0\..*", r".*\.(query|key)"


def test_groups_and_patterns_have_their_own_blocks_centroids_and_lengths(tmp_path, parity_data):
    config = IPQConfig(
        stages=["embeddings", FIRST, SECOND, "ffn"],
        block_size={"embeddings": 8, FIRST: 2, SECOND: 4, "ffn": 16},
        n_centroids={"embeddings": 8, FIRST: 16, SECOND: 32, "ffn": 12},
        leftover_bits=32,
    )
    settings = {"embeddings": {"steps": 1}, FIRST: {"steps": 2}, SECOND: {"steps": 3}}
    trainer = make_trainer(tmp_path, make_stacked("bert", 3), parity_data)
    small = trainer.compress(config, CompressionArguments(stage_steps=4, stage_settings=settings))
    history = trainer.compression_history[1:]
    assert [record["stage"] for record in history] == config.stages
    assert [record["step"] for record in history] == [1, 1 + 2, 1 + 2 + 3, 1 + 2 + 3 + 4]
    found = {
        name: (layer.quantizer.block_size, layer.quantizer.n_centroids)
        for name, layer in packed_layers(small)
    }
    # A layer belongs to the first stage that matches it.
    assert found["bert.encoder.layer.0.attention.self.query"] == (2, 16)
    assert found["bert.encoder.layer.0.output.dense"] == (2, 16)
    assert found["bert.encoder.layer.1.attention.self.query"] == (4, 32)
    assert found["bert.encoder.layer.2.output.dense"] == (16, 12)
    assert found["bert.embeddings.word_embeddings"] == (8, 8)
    assert "bert.encoder.layer.1.attention.self.value" not in found
    packed_in = [set(record["layer_errors"]) for record in history]
    assert sum(map(len, packed_in)) == len(found) == len(set.union(*packed_in))


@pytest.mark.parametrize("stage", ["ffn", "attention"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart", "vit", "deberta"])
def test_layers_are_packed_in_the_order_of_the_forward(name, stage, monkeypatch):
    model, reached, packed = make_stacked(name, 3), [], []
    block = {
        module: found[1]
        for path, module in model.named_modules()
        if (found := re.match(r"(.*\.\d+)\.", path)) and isinstance(module, (nn.Linear, Conv1D))
    }
    hooks = [
        module.register_forward_hook(lambda layer, *_: reached.append(block[layer]))
        for module in block
    ]
    with torch.no_grad():
        model(**inputs_of(name))
    for hook in hooks:
        hook.remove()
    real = packer.pack_layer

    def pack(modules, *args, **kwargs):
        packed.append(block[modules[0]])
        return real(modules, *args, **kwargs)

    monkeypatch.setattr(packer, "pack_layer", pack)
    config = IPQConfig(block_size=4, n_centroids=4, stages=[stage], leftover_bits=32)
    quantize_model(model, config, progress=False)
    order = list(dict.fromkeys(packed))
    assert order == [each for each in dict.fromkeys(reached) if each in order]
    assert len(order) >= 3


@pytest.mark.parametrize("name", ["lm_head", "transformer.wte"])
@pytest.mark.parametrize("stages", [["{}"], ["ffn", "{}"], ["ffn", ".*attn.*|{}"]])
def test_stage_that_names_one_layer_of_a_tied_pair_packs_the_pair(name, stages):
    stages = [stage.format(name) for stage in stages]
    config = IPQConfig(block_size=4, n_centroids=8, stages=stages)
    model = make_model("gpt2")
    packer = ModelPacker(model, config)
    assert {"lm_head", "transformer.wte"} <= set(packer.layers_of(stages[-1]))
    assert not {"lm_head", "transformer.wte"} & packer.config.left_dense.keys()
    packed = quantize_model(model, config, progress=False)
    plan = packed.config.quantization_config.plan
    assert plan["lm_head"]["scheme"] == plan["transformer.wte"]["scheme"] == "pq"
    assert packed.lm_head.weight_indices is packed.transformer.wte.weight_indices
