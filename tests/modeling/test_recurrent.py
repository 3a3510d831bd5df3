"""Recurrent and state-space models: train, evaluate, generate, save, with packed weights."""

import copy

import pytest
import torch
from support.stored import PQ
from support.tiny import SIZES
from support.zoo import ipq_config
from transformers import AutoConfig, AutoModelForCausalLM

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    IPQConfig,
    allocate_bits,
    quantize_model,
)

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STATES = {"state_size": 4, "time_step_rank": 4}
MAMBA_2 = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1,
    "num_key_value_heads": 2, "mamba_chunk_size": 4,
}  # fmt: skip
KINDS = {
    "mamba": STATES,
    "falcon_mamba": STATES,
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "bamba": {**MAMBA_2, "attn_layer_indices": [1]},
    "lfm2": {"num_key_value_heads": 2},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 1},
}
IDS = torch.randint(5, 320, (2, 8), generator=torch.Generator().manual_seed(0))


def make(kind, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **TOKENS, **KINDS[kind], **settings})
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("scheme", ["ipq", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_model_trains_evaluates_generates_and_saves(kind, scheme, tmp_path):
    dense = make(kind)
    config = ipq_config(dense) if scheme == "ipq" else FixedPointConfig(bits=8)
    model = quantize_model(dense, config, progress=False)
    expected = logits(model)
    for _ in range(2):
        model.train()(IDS, labels=IDS).loss.backward()
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoQuantizedModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    dequantized = copy.deepcopy(model).dequantize()
    torch.testing.assert_close(logits(dequantized), expected, rtol=1e-4, atol=1e-4)
    tokens = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(loaded.generate(IDS, **tokens), dequantized.generate(IDS, **tokens))


def test_rwkv_that_was_evaluated_packs_its_own_weights(tmp_path):
    """Evaluation divides weights in place; they are multiplied again before they are packed."""
    fresh, evaluated = make("rwkv"), make("rwkv")
    logits(evaluated)
    weight = fresh.rwkv.blocks[1].attention.output.weight
    assert not torch.equal(evaluated.rwkv.blocks[1].attention.output.weight, weight)
    one, other = (
        quantize_model(each, IPQConfig(**PQ), progress=False) for each in (fresh, evaluated)
    )
    assert torch.equal(logits(one), logits(other))


def test_allocating_bits_leaves_the_weights_of_rwkv_as_they_are():
    """The sensitivities are measured on a copy in eval mode that shares the weights."""
    model = make("rwkv").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = IPQConfig(target_bits_per_weight=12)
    allocate_bits(model, config, [{"input_ids": IDS}], progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_packed_rwkv_computes_nearly_as_the_dense_one_that_is_rescaled():
    model = quantize_model(make("rwkv"), FixedPointConfig(bits=8), progress=False)
    dense = copy.deepcopy(model).dequantize()
    dense.config.rescale_every = 1
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-2)


def test_file_that_asks_for_rescaling_loads_without(tmp_path):
    model = quantize_model(make("rwkv"), FixedPointConfig(bits=8), progress=False)
    model.config.rescale_every = 1
    model.save_pretrained(tmp_path)
    loaded = AutoQuantizedModel.from_pretrained(tmp_path)
    assert loaded.config.rescale_every == 0
    assert loaded(IDS).logits.isfinite().all()
