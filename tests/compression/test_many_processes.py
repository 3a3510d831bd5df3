"""Noise and pass on two gloo processes: one model, and the one a single process makes."""

import json
from pathlib import Path

import pytest
import torch
from processes import needs_gloo, torchrun
from safetensors.torch import load_file
from stacked import make_stacked
from tiny import VOCABULARY
from transformers import AutoModelForSequenceClassification

import hf_quantnoise  # noqa: F401  (its models load)
from hf_quantnoise.compression.sharded import replicated_parameters, units_to_shard

PROGRAM = Path(__file__).parents[1] / "noise_and_pass.py"
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
# int8 noise at p = 1 draws nothing, so both ways see the same weights.
ALL_INT8 = {"noise": "int8", "p": 1.0}


@pytest.fixture
def run(tmp_path, parity_data):
    parity_data.save_to_disk(str(tmp_path / "data"))
    language = parity_data.map(lambda row: {"labels": row["input_ids"]})
    language.save_to_disk(str(tmp_path / "language"))

    def start(name: str, world: int, **options):
        torchrun(PROGRAM, str(tmp_path), name, json.dumps(options), processes=world)
        parts = ("noise", "dense", "model")
        return [
            {
                **{part: load_file(file) for part in parts
                   if (file := tmp_path / f"{name}-{rank}-{part}").is_file()},
                **json.loads((tmp_path / f"{name}-{rank}-figures").read_text()),
            }
            for rank in range(world)
        ]  # fmt: skip

    start.folder = tmp_path
    return start


def assert_ranks_agree(one, other):
    for part in ("noise", "dense", "model"):
        assert one.get(part, {}).keys() == other.get(part, {}).keys()
        for name, tensor in one.get(part, {}).items():
            assert torch.equal(tensor, other[part][name]), name
    for figure in ("errors", "losses"):
        assert one.get(figure) == other.get(figure)


def assert_close(one, single, rtol=1e-3, atol=1e-5):
    for part in ("noise", "dense", "model"):
        assert one.get(part, {}).keys() == single.get(part, {}).keys()
        for name, tensor in one.get(part, {}).items():
            if not name.endswith("indices"):
                torch.testing.assert_close(tensor, single[part][name], rtol=rtol, atol=atol)
    assert one["errors"] == pytest.approx(single["errors"], rel=1e-3)
    assert min(one["errors"].values()) > 0
    assert one["losses"] == pytest.approx(single["losses"], rel=1e-4)


@needs_gloo
def test_two_processes_hold_one_model_and_it_is_that_of_a_single_one(run):
    options = {"noise": ALL_INT8, "stages": {"stage_schedule": "continue"}}
    (single,) = run("single", 1, **options)
    one, other = run("two", 2, **options)
    # The program sees to it that each rank clusters half of the weights; both know all errors.
    assert_ranks_agree(one, other)
    assert_close(one, single)


@needs_gloo
def test_exact_noise_layerdrop_and_small_centroids_are_equal_on_both_ranks(run):
    options = {
        "noise": {"noise": "pq", "p": 0.2, "block_size": 4, "n_centroids": 16, "layerdrop": 0.3,
                  "codebook_update": 2, "share_layers": 2},
        "config": {"codebook_bits": 8, "activation_bits": 8},
        "arguments": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True,
                      "bf16": True},
        "stages": {},
    }  # fmt: skip
    assert_ranks_agree(*run("two", 2, **options))


@needs_gloo
def test_fsdp2_gives_the_model_of_a_single_process(run):
    options = {
        "noise": {**ALL_INT8, "scale_update_steps": 2},
        "stages": {"stage_schedule": "continue", "codebook_learning_rate": 3e-3},
        "arguments": {"optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.1},
    }
    (single,) = run("single", 1, **options)
    one, other = run("two", 2, **{**options, "arguments": {**options["arguments"], **FSDP2}})
    assert_ranks_agree(one, other)
    assert_close(one, single, rtol=5e-3, atol=2e-4)
    # All of the dense model was in parts; in the stages, what is not packed, biases of packed
    # layers being whole as well.
    dense = len(list(make_stacked("bert", 3).parameters()))
    assert one["sharded"][0] == dense
    assert dense > one["sharded"][1] > one["sharded"][2] > one["sharded"][3] > 0
    assert one["logs"] and one["logs"][0]["noised_share"] == single["logs"][0]["noised_share"]
    # Saved from all ranks, it loads as it is in memory.
    loaded = AutoModelForSequenceClassification.from_pretrained(run.folder / "two-saved")
    state = loaded.state_dict()
    for name, tensor in one["model"].items():
        assert torch.equal(state[name], tensor), name


@needs_gloo
def test_fsdp2_with_all_that_trainer_does(run):
    options = {
        "noise": {"noise": "pq", "p": 0.2, "block_size": 4, "n_centroids": 16, "layerdrop": 0.3,
                  "codebook_update": 2, "share_layers": 2, "activation_bits": 8},
        "config": {"codebook_bits": 8, "activation_bits": 8, "importance": "activations"},
        "stages": {"distill_hidden": 1.0, "distill_attention": 1.0},
        "arguments": {
            "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "bf16": True, **FSDP2
        },
    }  # fmt: skip
    one, other = run("two", 2, **options)
    assert_ranks_agree(one, other)
    assert all(count > 0 for count in one["sharded"])


@needs_gloo
def test_fsdp2_of_a_language_model_with_a_tied_head(run):
    options = {
        "model": "gpt2", "data": "language", "noise": ALL_INT8,
        "stages": {}, "config": {"stages": ["embeddings", "attention"]},
    }  # fmt: skip
    (single,) = run("single", 1, **options)
    one, other = run("two", 2, **options, arguments=FSDP2)
    assert_ranks_agree(one, other)
    assert_close(one, single)


@needs_gloo
def test_fsdp2_goes_on_where_it_was_killed(run):
    options = {
        "noise": ALL_INT8,
        "stages": {"stage_schedule": "continue"},
        "arguments": {**FSDP2, "optim": "adamw_torch"},
    }
    undisturbed, _ = run("run", 2, **options)
    (run.folder / "run-0-figures").unlink()
    with pytest.raises(FileNotFoundError):
        run("killed", 2, **options, kill=2)
    checkpoints = sorted(path.name for path in (run.folder / "killed").glob("checkpoint-*"))
    assert (run.folder / "killed" / "compression" / "run-2").is_dir()
    # The noise phase from its first checkpoint, which holds a plain model; then the pass.
    plain = load_file(run.folder / "killed" / checkpoints[0] / "model.safetensors")
    assert {k: v.shape for k, v in plain.items()} == {
        k: v.shape for k, v in undisturbed["dense"].items()
    }
    folder = str(run.folder / "killed" / checkpoints[0])
    one, other = run("killed", 2, **options, checkpoint=folder, resume=True)
    assert_ranks_agree(one, other)
    for part in ("dense", "model"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(tensor, undisturbed[part][name], rtol=1e-5, atol=1e-7)


@needs_gloo
@pytest.mark.parametrize(
    "options, words",
    [
        ({"on_cpus": True, "arguments": FSDP2}, "fsdp=True: accelerate shards on GPUs"),
        (
            {"arguments": {"fsdp": True, "fsdp_config": {"version": 1}}},
            "FSDP1 flattens the weights",
        ),
        (
            {"arguments": FSDP2, "stages": {"reassign_steps": 2}},
            "reassign_steps=2 does not go with fsdp",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(run, options, words):
    with pytest.raises(AssertionError, match=words):
        run("refused", 2, **options)


def test_what_stays_whole_and_what_is_sharded_one_by_one():
    bert = make_stacked("bert", 3)
    assert replicated_parameters(bert) == []
    assert units_to_shard(bert, None) == ["BertLayer"]  # not the embeddings, which hold the table
    assert units_to_shard(bert, ["BertSelfAttention"]) == ["BertSelfAttention"]
    assert units_to_shard(bert, ["Absent"]) == ["Absent"]  # for accelerate to refuse
    gpt2 = make_stacked("gpt2", 3)
    assert replicated_parameters(gpt2) == []  # accelerate shards the head with the table
    roberta = make_stacked("roberta-mlm", 3)
    assert [p.shape for p in replicated_parameters(roberta)] == [(VOCABULARY,)]  # a tied bias
    bart = make_stacked("bart", 3)
    assert [p.shape for p in replicated_parameters(bart)] == [(VOCABULARY, 32)]  # four holders
    bart.scale = torch.nn.Parameter(torch.ones(()))
    assert len(replicated_parameters(bart)) == 2
