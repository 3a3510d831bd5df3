"""Noise in groups of rows in trainers: counting, resuming, compression, ranks."""

from dataclasses import replace

import pytest
import torch
from support.processes import needs_gloo, on_two_ranks
from support.row_groups import LEARNED, NAME, ROWS, TARGET, batch
from support.tiny import make_model
from support.trainers import assert_same, make_trainer, with_other_weights

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseCallback,
    QuantNoiseConfig,
    count_lookups,
)
from hf_quantnoise.compression import fitted_noise
from hf_quantnoise.modeling.packer import ModelPacker
from hf_quantnoise.noise import find_state

SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 0}
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


@needs_gloo
def test_ranks_have_the_same_groups(tmp_path):
    first, second = on_two_ranks(RANKS, tmp_path)
    ids = torch.cat([first["ids"], second["ids"]]).view(-1)
    assert torch.equal(first["lookups"][NAME], torch.bincount(ids, minlength=ROWS))
    assert first["rows"] == second["rows"]
    for moment in ("fitted", "refreshed"):
        assert f"{NAME}.1.row_groups" in first[moment]
        assert_same(first[moment], second[moment])
