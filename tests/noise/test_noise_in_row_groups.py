"""Noise on tables in groups of rows: blocks, gradients, and the packed model at the end."""

from dataclasses import replace

import pytest
import torch
from support.decode_only import decode_only
from support.processes import needs_gloo, on_two_ranks
from support.tiny import make_model
from support.trainers import assert_same, make_trainer, with_other_weights
from torch import nn
from transformers import HfArgumentParser

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseCallback,
    QuantNoiseConfig,
    apply_quant_noise,
    count_lookups,
    quantize_model,
)
from hf_quantnoise.blocks import to_blocks
from hf_quantnoise.compression import fitted_noise
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.packer import ModelPacker
from hf_quantnoise.noise import find_state
from hf_quantnoise.quantizers import RowGroupQuantizer
from hf_quantnoise.runs.arguments import ConfigFlags

ROWS, COLUMNS = 320, 32
TARGET = IPQConfig(
    block_size=4, rare_block_size=16, n_centroids=16, frequent_rows=100, leftover_bits=32
)
LEARNED = {"noise": "pq", "p": 1.0, "learn_codebooks": True}


def batch():
    # Word i about 400 / i times, in an order that is not that of the ids.
    weights = 1.0 / (torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)) + 1.0)
    ids = torch.multinomial(weights, 512, True, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.view(16, 32)}


def noisy(model, target=TARGET, **fields):
    """Return a model with noise that matches a target, and the noise of its table."""
    config = QuantNoiseConfig.matching(target, model, **fields)
    apply_quant_noise(model, config, count_lookups(model, [batch()])).train()
    table = model.get_input_embeddings()
    (weight,) = [w for w in find_state(model).weights if table in w.modules]
    return model, weight.noise.functions[0][1]


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

NAME = "bert.embeddings.word_embeddings"
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


# ---- trainers ------------------------------------------------------------------------------------

SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 0}


def trainer_for(folder, data, noise, **arguments):
    parts = {"compression_args": CompressionArguments(codebook_learning_rate=1e-3, stage_epochs=0)}
    model = with_other_weights(make_model("bert"))
    return make_trainer(folder, model, data, noise, parts=parts, **{**SETTINGS, **arguments})


def table_of(trainer):
    return {k: v for k, v in find_state(trainer.model).state_dict().items() if k.startswith(NAME)}


def test_trainer_counts_its_data_and_compress_takes_over(tmp_path, parity_data):
    target = replace(TARGET, frequent_rows=0.9)
    noise = QuantNoiseConfig.matching(target, make_model("bert"), **LEARNED, codebook_update=2)
    trainer = trainer_for(tmp_path, parity_data, noise)
    counts = torch.bincount(torch.tensor(parity_data["input_ids"]).view(-1), minlength=ROWS)
    assert torch.equal(find_state(trainer.model).lookups[NAME], counts)
    ranked = torch.sort(counts, descending=True, stable=True)
    n_rows = find_state(trainer.model).config.frequent_rows
    served = ranked.values.cumsum(0)
    assert served[n_rows - 1] >= 0.9 * served[-1] > served[n_rows - 2]
    trainer.train()
    saved = QuantNoiseConfig.from_pretrained(tmp_path / "checkpoint-4")
    assert saved == replace(noise, frequent_rows=n_rows)
    find_state(trainer.model).refresh_codebooks()
    trained = {key: tensor.clone() for key, tensor in table_of(trainer).items()}
    trainer.train_dataset = None  # the noise has the lookups
    layer = trainer.compress(target).get_input_embeddings()
    groups = layer.quantizer.groups(layer.state)
    assert sorted(ranked.indices[:n_rows].tolist()) == torch.nonzero(groups == 0).view(-1).tolist()
    assert torch.equal(layer.codes(), trained.pop(f"{NAME}.0.codes"))
    assert_same({f"{NAME}.0.{key}": tensor for key, tensor in layer.state.items()}, trained)


@pytest.mark.parametrize("learn", [True, False])
def test_resumed_training_keeps_the_groups(learn, tmp_path, parity_data):
    noise = QuantNoiseConfig.matching(
        TARGET, noise="pq", p=0.5, learn_codebooks=learn, codebook_update=2
    )
    complete = trainer_for(tmp_path / "complete", parity_data, noise)
    complete.train()
    other_words = parity_data.map(lambda row: {"input_ids": [319 - id for id in row["input_ids"]]})
    resumed = trainer_for(tmp_path / "resumed", other_words, noise)
    assert not torch.equal(
        table_of(resumed)[f"{NAME}.0.row_groups"], table_of(complete)[f"{NAME}.0.row_groups"]
    )
    resumed.train_dataset = parity_data
    resumed.train(resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-2"))
    assert_same(find_state(resumed.model).state_dict(), find_state(complete.model).state_dict())
    assert_same(dict(resumed.model.state_dict()), dict(complete.model.state_dict()))


def test_interrupted_compression_keeps_what_noise_trained(tmp_path, parity_data, monkeypatch):
    noise = QuantNoiseConfig.matching(TARGET, make_model("bert"), **LEARNED)
    results = []
    for name in ("complete", "interrupted"):
        trainer = trainer_for(tmp_path / name, parity_data, noise)
        trainer.train()
        if name == "interrupted":
            monkeypatch.setattr(ModelPacker, "_pack", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trainer.compress(TARGET)
            monkeypatch.undo()
            trainer = trainer_for(tmp_path / name, parity_data, noise)
        model = trainer.compress(TARGET, resume_from_checkpoint=name == "interrupted")
        results.append(dict(model.state_dict()))
    assert_same(*results)


def test_resumed_compression_has_the_lookups_that_were_counted(tmp_path, parity_data, monkeypatch):
    target = replace(TARGET, frequent_rows=0.9)
    complete = trainer_for(tmp_path / "complete", parity_data, None).compress(target)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ModelPacker, "_pack", lambda *_: 1 / 0)
        trainer_for(tmp_path / "b", parity_data, None).compress(target)
    monkeypatch.setattr(fitted_noise, "count_lookups", lambda *_: 1 / 0)
    resumed = trainer_for(tmp_path / "b", parity_data, None)
    resumed = resumed.compress(target, resume_from_checkpoint=True)
    assert_same(dict(resumed.state_dict()), dict(complete.state_dict()))


def test_noise_of_pending_stages_has_the_groups(tmp_path, parity_data):
    noise = QuantNoiseConfig.matching(replace(TARGET, frequent_rows=0.9), noise="pq", p=0.3)
    trainer = trainer_for(tmp_path, parity_data, noise, save_strategy="no")
    settings = CompressionArguments(keep_noise=True, stage_steps=1)
    model = trainer.compress(IPQConfig(block_size=4, n_centroids=16), settings)
    assert find_state(model) is None
    assert len(trainer.compression_history) == 4


def test_callback_takes_lookups_for_other_trainers():
    model = make_model("bert")
    callback = QuantNoiseCallback(
        QuantNoiseConfig.matching(TARGET), lookups=count_lookups(model, [batch()])
    )
    callback.prepare(model)
    assert f"{NAME}.0.row_groups" in find_state(model).state_dict()


RANKS = """
from support.tiny import make_model
from hf_quantnoise import IPQConfig, QuantNoiseConfig, apply_quant_noise, count_lookups
from hf_quantnoise.noise import find_state

torch.manual_seed(rank)  # each rank has its part of the data, and here other weights
model = make_model("bert", seed=rank)
found["ids"] = torch.randint(0, 320, (8, 16))
found["lookups"] = count_lookups(model, [{"input_ids": found["ids"]}])
config = QuantNoiseConfig(
    noise=["pq", "proxy"], p=0.3, n_centroids=16, frequent_rows=0.7, rare_block_size=16
)
apply_quant_noise(model, config, found["lookups"]).train()
state = find_state(model)
found["fitted"] = {name: tensor.clone() for name, tensor in state.state_dict().items()}
state.refresh_codebooks()
found["refreshed"] = state.state_dict()
found["rows"] = state.config.frequent_rows
"""


@needs_gloo
def test_ranks_have_the_same_groups(tmp_path):
    first, second = on_two_ranks(RANKS, tmp_path)
    ids = torch.cat([first["ids"], second["ids"]]).view(-1)
    assert torch.equal(first["lookups"][NAME], torch.bincount(ids, minlength=ROWS))
    assert first["rows"] == second["rows"]
    for moment in ("fitted", "refreshed"):
        assert f"{NAME}.1.row_groups" in first[moment]
        assert_same(first[moment], second[moment])


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
