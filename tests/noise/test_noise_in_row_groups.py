"""Noise on tables in groups of rows: blocks, gradients, and the packed model at the end."""

from dataclasses import replace

import pytest
import torch
from support.decode_only import decode_only
from support.row_groups import COLUMNS, LEARNED, NAME, ROWS, TARGET, batch, noisy
from support.tiny import make_model
from support.trainers import assert_same
from torch import nn
from transformers import HfArgumentParser

from hf_quantnoise import (
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    count_lookups,
    quantize_model,
)
from hf_quantnoise.blocks import to_blocks
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.noise import find_state
from hf_quantnoise.quantizers import RowGroupQuantizer
from hf_quantnoise.runs.arguments import ConfigFlags


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", ["bert", "bert-mlm"])  # the second table is tied
@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_blocks_are_those_of_the_group_of_the_row(name, p):
    model, noise = noisy(make_model(name), noise="proxy", p=p)
    table, groups = model.get_input_embeddings(), noise.quantizer.groups(noise.state)
    assert groups.bincount().tolist() == [100, 220]
    ids = torch.arange(ROWS).repeat(2)
    for _ in range(3):
        first, second = (table(ids) == 0).split(ROWS)
        assert torch.equal(first, second), "a word that is looked up twice has one noise"
        for group, size in enumerate((4, 16)):
            zero = first[groups == group].view(-1, size)
            assert torch.equal(zero.all(1), zero.any(1)), "blocks are noised completely"
            share = zero[:, 0].float().mean().item()
            assert share == pytest.approx(p, abs=4 * (0.25 / len(zero)) ** 0.5)
            if p < 1:  # neighbours are independent
                rows = zero[:, 0].view(-1, COLUMNS // size)
                assert (rows[:, 0] != rows[:, 1]).any()
    if name == "bert-mlm":
        head = model.get_output_embeddings()
        with torch.no_grad():
            looked_up = table(torch.arange(ROWS))
            weight = head(torch.eye(COLUMNS)) - (0 if head.bias is None else head.bias)
        assert torch.equal(weight.t() == 0, looked_up == 0)


@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_pq_noise_puts_the_decoded_blocks_of_the_group(p):
    model, noise = noisy(make_model("bert"), noise="pq", p=p)
    table, quantizer = model.get_input_embeddings(), noise.quantizer
    matrix = table.weight.detach()
    groups = quantizer.groups(noise.state)
    decoded = torch.empty_like(matrix)
    for group, part in enumerate(quantizer.parts):  # each group by itself
        own = groups == group
        decoded[own] = part.quantize(matrix[own], part.fit(matrix[own]))
    found = table(torch.arange(ROWS)).detach()
    assert ((found == decoded) | (found == matrix)).all()
    changed = found != matrix
    assert changed.float().mean() == pytest.approx(p, abs=0.06)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_centroid_gradient_is_the_mean_over_its_noised_blocks(p):
    model, noise = noisy(make_model("bert"), **{**LEARNED, "p": p})
    table, quantizer = model.get_input_embeddings(), noise.quantizer
    with torch.no_grad():
        noise.state["codebook"].add_(0.05)  # so that noised blocks are known
    ids = torch.arange(1, ROWS, 3)  # row 0 is padding, which gets no gradient
    found = table(ids)
    found.square().sum().backward()
    dense = 2 * found.detach().double()  # the gradient of each looked-up value
    noised = (found != table.weight[ids]).detach()
    groups, codes = quantizer.groups(noise.state), noise.state["codes"]
    books = noise.state["codebook"].grad.split([16 * 4, 16 * 16])
    for group, part in enumerate(quantizer.parts):
        size, expected = part.block_size, torch.zeros(16, part.block_size, dtype=torch.float64)
        of_group = codes[groups == group][:, : COLUMNS // size]
        counts = torch.bincount(of_group.reshape(-1).int(), minlength=16)
        own = groups[ids] == group
        gradients = to_blocks(dense[own] * noised[own], size)
        expected.index_add_(0, codes[ids][own][:, : COLUMNS // size].reshape(-1).long(), gradients)
        expected /= counts[:, None].clamp(min=1)
        actual = books[group].view(16, size).double()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weight = torch.zeros(ROWS, COLUMNS)  # straight through
    weight[ids] = dense.float()
    assert torch.equal(table.weight.grad, weight)


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"codebook_bits": 8, "row_scale": True}, {"n_codebooks": 2}, {"n_centroids": 5}],
    ids=str,
)
def test_packing_takes_over_what_noise_trained(name, fields, monkeypatch):
    target = replace(TARGET, **fields)
    model, noise = noisy(without_dropout(make_model(name)), target, **LEARNED)
    state = find_state(model)
    optimizer = torch.optim.Adam([*model.parameters(), *state.parameters()], 3e-3)
    for step in range(3):
        model(**batch()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step != 1:
            state.refresh_codebooks()
    with torch.no_grad():
        expected = model(**batch()).logits
    trained = {key: tensor.detach().clone() for key, tensor in noise.state.items()}
    for module in ("product", "additive"):  # nothing is clustered
        monkeypatch.setattr(f"hf_quantnoise.quantizers.{module}.kmeans", None, raising=False)
    quantize_model(model, target, progress=False)  # needs no data: the noise has the lookups
    layer = model.get_input_embeddings()
    assert isinstance(layer.quantizer, RowGroupQuantizer)
    assert torch.equal(layer.codes(), trained.pop("codes"))
    assert_same(dict(layer.state), trained)
    with torch.no_grad():
        assert torch.equal(decode_only(model)(**batch()).logits, expected)


# ---- what a config means -------------------------------------------------------------------------

BY_NAME = {"scheme": "row_groups", "group_rows": [40, 280], "block_sizes": [8, 32]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"frequent_rows": 0.8},
        {"frequent_rows": 400},  # more than the table has
        {"frequent_rows": None, "layer_quantizers": {NAME: {**BY_NAME, "n_centroids": 16}}},
        {"layer_quantizers": {NAME: {"scheme": "pq", "block_size": 8, "n_centroids": 16}}},
        {"block_size": {"ffn": 8, "attention": 4}, "stages": ["ffn", "attention"]},
    ],
    ids=str,
)
def test_matching_noise_has_the_quantizers_of_the_target(fields):
    target = IPQConfig(**{**vars(TARGET), "stages": None, **fields})
    model = make_model("bert")
    lookups = count_lookups(model, [batch()])
    config = QuantNoiseConfig.matching(target, model, noise="pq")
    assert QuantNoiseConfig.from_dict(config.to_dict()) == config
    apply_quant_noise(model, config, lookups)
    noised = {
        name: weight.noise.functions[0][1].quantizer
        for weight in find_state(model).weights
        for name in weight.names
    }
    quantize_model(model, target, progress=False, calibration_data=[batch()])
    packed = {name: layer.quantizer for name, layer in packed_layers(model)}
    assert packed == noised


@pytest.mark.parametrize(
    ("fields", "more", "message"),
    [
        ({}, {"noise": ["mean"]}, r"invalid frequent_rows=.* with noise=\['mean'\]"),
        ({}, {"block_selection": "cluster"}, "and block_selection='cluster'"),
        ({"frequent_rows": 0.5, "layer_quantizers": {NAME: {"scheme": "dense"}}}, {},
         "cannot match frequent_rows=0.5 together with layer_quantizers"),
        ({"layer_quantizers": {NAME: {**BY_NAME, "group_rows": [10, 30, 280],
                                      "block_sizes": [4, 8, 32], "n_centroids": 8}}}, {},
         "noise has two groups of rows, and this layer 3"),
    ],
)  # fmt: skip
def test_noise_that_cannot_match_raises(fields, more, message):
    with pytest.raises(ValueError, match=message):
        QuantNoiseConfig.matching(replace(TARGET, **fields), make_model("bert"), **more)


def test_matching_by_group_needs_a_model_for_single_layers():
    assert QuantNoiseConfig.matching(TARGET).frequent_rows == 100
    with pytest.raises(ValueError, match=r"use QuantNoiseConfig.matching\(config, model\)"):
        QuantNoiseConfig.matching(replace(TARGET, layer_quantizers={NAME: {"scheme": "dense"}}))


def test_flags_are_those_of_noise_and_compressed_model():
    words = ["--noise", "pq", "--frequent_rows", "0.9", "--rare_block_size", "16"]
    (flags,) = HfArgumentParser(ConfigFlags).parse_args_into_dataclasses(words)
    for config in (flags.noise_config(seed=0), flags.config(seed=0)):
        assert (config.frequent_rows, config.rare_block_size) == (0.9, 16)


def test_missing_or_wrong_lookups_raise():
    model, config = make_model("bert"), QuantNoiseConfig.matching(TARGET)
    with pytest.raises(ValueError, match=r"pass lookups=count_lookups\(model, batches\)"):
        apply_quant_noise(model, config)
    for lookups in ({}, {NAME: torch.ones(7)}):
        with pytest.raises(ValueError, match=r"invalid lookups: got .* each of its 320 rows"):
            apply_quant_noise(model, config, lookups)
    assert find_state(model) is None
    with pytest.raises(ValueError, match="invalid rare_block_size=0"):
        QuantNoiseConfig(rare_block_size=0)
    with pytest.raises(ValueError, match="invalid frequent_rows"):
        QuantNoiseConfig(frequent_rows={"embeddings": 0.5})


@pytest.mark.parametrize("fields", [{"noise": "proxy"}, {"noise": "pq"}, LEARNED], ids=str)
def test_compiled_noise_uses_current_rates_and_codebooks(fields):
    torch._dynamo.reset()
    model, _ = noisy(make_model("bert"), **fields)
    state, table = find_state(model), model.get_input_embeddings()
    compiled = torch.compile(table, backend="aot_eager")
    ids = torch.arange(ROWS)
    for rate in (0.2, 0.5):
        state.p = rate
        changed = (compiled(ids) != table.weight).float()
        assert changed.mean().item() == pytest.approx(rate, abs=0.06)
    state.p = 1.0
    with torch.no_grad():
        table.weight.mul_(1.5)
    state.refresh_codebooks()
    assert torch.equal(compiled(ids), table(ids))
