"""Tied weights of the zoo are stored once and stay one Parameter after loading."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.files import digest
from support.zoo import TIED, ZOO, ipq_config, users_of_table
from torch import nn
from transformers import AutoConfig

from hf_quantnoise import FixedPointConfig, IPQConfig, quantize_model
from hf_quantnoise.modeling import packed_names

CONFIGS = {
    "ipq": ipq_config,
    "ipq-int8": lambda model: IPQConfig(
        block_size=4, n_centroids=8, codebook_bits=8, stages=["embeddings"]
    ),
    "dense": lambda model: FixedPointConfig(exclude_modules=users_of_table(model)),
}


def is_one(model, users: list[str]) -> bool:
    """Return whether all users hold the same Parameters."""
    layers = [model.get_submodule(name) for name in users]
    names = packed_names(layers[0]) or ["weight"]
    return all(getattr(layer, n) is getattr(layers[0], n) for layer in layers for n in names)


def stored_users(folder, users: list[str]) -> set[str]:
    """Return the users whose weight is in the file; the one-byte sentinel does not count."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = [key.rpartition(".") for key in file.keys()]  # noqa: SIM118
        return {
            layer
            for layer, _, leaf in keys
            if layer in users
            and leaf.startswith("weight")
            and file.get_slice(f"{layer}.{leaf}").get_shape() != [1]
        }


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_stored_once_and_stay_tied(name, config, tmp_path):
    kind = ZOO[name]
    model = kind.make()
    users = users_of_table(model)
    assert len(users) == TIED[name]
    n_parameters = len(list(model.parameters()))
    quantize_model(model, CONFIGS[config](model), progress=False)
    assert is_one(model, users)
    model.save_pretrained(tmp_path / "a")
    assert len(stored_users(tmp_path / "a", users)) == 1
    again = kind.auto.from_pretrained(tmp_path / "a")
    assert is_one(again, users)
    assert len(list(again.parameters())) == len(list(model.parameters()))
    again.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    again.dequantize().save_pretrained(tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense")
    for dense in (again, plain):
        assert is_one(dense, users) and len(list(dense.parameters())) == n_parameters


@pytest.mark.parametrize(
    ("name", "replaced"),
    [
        ("GPT-2", ["lm_head"]),
        ("GPT-2", ["transformer.wte"]),
        ("T5", ["lm_head"]),
        ("T5", ["shared"]),
        ("T5", ["encoder.embed_tokens"]),
        ("T5", ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]),
    ],
)
@torch.no_grad()
def test_replaced_user_of_table_stays_replaced(name, replaced, tmp_path):
    kind = ZOO[name]
    model = kind.make()
    users = users_of_table(model)
    quantize_model(model, ipq_config(model), progress=False)
    layer = model.get_submodule(replaced[0])
    torch.manual_seed(1)
    if isinstance(layer, nn.Embedding):
        new = nn.Embedding(layer.num_embeddings, layer.embedding_dim)
    else:
        new = nn.Linear(layer.in_features, layer.out_features, bias=False)
    for user in replaced:
        model.set_submodule(user, new)
    expected = model(**kind.batch()).logits
    model.save_pretrained(tmp_path / "a")
    again, info = kind.auto.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(again(**kind.batch()).logits, expected)
    others = [user for user in users if user not in replaced]
    assert is_one(again, others) and is_one(again, replaced)
    assert again.config.quantization_config.plan.keys().isdisjoint(replaced)
    again.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    again.tie_weights()
    assert torch.equal(again(**kind.batch()).logits, expected)
    # Also if the files are read by the caller.
    state = load_file(tmp_path / "a" / "model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(again(**kind.batch()).logits, expected)


@pytest.mark.parametrize("name", ["RoBERTa", "ALBERT", "GPT-2", "T5"])
def test_training_keeps_ties(name, tmp_path):
    kind = ZOO[name]
    model = kind.make()
    users = users_of_table(model)
    quantize_model(model, ipq_config(model), progress=False).save_pretrained(tmp_path / "a")
    model = kind.auto.from_pretrained(tmp_path / "a").train()
    codebook = model.get_submodule(users[0]).weight_codebook
    before = codebook.detach().clone()
    model(**kind.batch()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(codebook, before)
    model.save_pretrained(tmp_path / "b")
    again = kind.auto.from_pretrained(tmp_path / "b")
    assert is_one(again, users)
    stored = codebook.to(torch.float16).float()
    assert torch.equal(again.get_submodule(users[-1]).weight_codebook, stored)


def test_albert_layers_are_stored_once(tmp_path):
    kind, sizes = ZOO["ALBERT"], []
    for layers in (2, 5):
        config = kind.make().config
        config.num_hidden_layers = layers
        torch.manual_seed(0)
        model = kind.auto.from_config(config).eval()
        quantize_model(model, ipq_config(model), progress=False).save_pretrained(tmp_path)
        sizes.append((tmp_path / "model.safetensors").stat().st_size)
        with torch.no_grad():
            loss = kind.auto.from_pretrained(tmp_path)(**kind.batch()).loss
            assert torch.equal(loss, model(**kind.batch()).loss)
    assert sizes[0] == sizes[1]
