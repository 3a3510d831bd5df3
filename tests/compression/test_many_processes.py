"""Training and compression on two gloo processes: equal on both, and to a single process."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import accelerate_launch, needs_gloo, torchrun
from support.stacked import make_stacked
from transformers import AutoModelForSequenceClassification

import hf_quantnoise  # noqa: F401  (its models load)

PROGRAM = Path(__file__).parents[1] / "support" / "train_and_compress.py"
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
# int8 noise at p = 1 is deterministic, so one process and two see the same weights.
ALL_INT8 = {"noise": "int8", "p": 1.0}
COMPLETE_RUN = {
    "noise": {**ALL_INT8, "scale_update_steps": 2},
    "stages": {"codebook_learning_rate": 3e-3},
    "arguments": {"optim": "adamw_torch", "weight_decay": 0.1, "max_grad_norm": 0.1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, parity_data):
    tmp_path = tmp_path_factory.mktemp("runs")
    parity_data.save_to_disk(str(tmp_path / "data"))
    language = parity_data.map(lambda row: {"labels": row["input_ids"]})
    language.save_to_disk(str(tmp_path / "language"))

    def start(name: str, world: int, launcher=torchrun, **options):
        command = (PROGRAM, str(tmp_path), name, json.dumps(options))
        if launcher is torchrun:
            torchrun(*command, processes=world)
        else:
            launcher(*command)
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


def assert_close(one, single, rtol=5e-3, atol=2e-4):
    for part in ("noise", "dense", "model"):
        assert one.get(part, {}).keys() == single.get(part, {}).keys()
        for name, tensor in one.get(part, {}).items():
            if not name.endswith("indices"):
                torch.testing.assert_close(tensor, single[part][name], rtol=rtol, atol=atol)
    assert one["errors"] == pytest.approx(single["errors"], rel=1e-3)
    assert min(one["errors"].values()) > 0
    assert one["losses"] == pytest.approx(single["losses"], rel=1e-4)


@pytest.fixture(scope="module")
def single(run):
    return run("single", 1, **COMPLETE_RUN)[0]


@needs_gloo
def test_ddp_equals_a_single_process(run, single):
    one, other = run("ddp", 2, **COMPLETE_RUN)
    # The program checks that each rank clusters half of the weights; both know all errors.
    assert_ranks_agree(one, other)
    assert_close(one, single)


@pytest.mark.slow
@needs_gloo
def test_pq_noise_layerdrop_and_int8_centroids_are_equal_on_both_ranks(run):
    options = {
        "noise": {"noise": "pq", "p": 0.2, "block_size": 4, "n_centroids": 16, "layerdrop": 0.3,
                  "codebook_update": 2, "share_layers": 2},
        "config": {"codebook_bits": 8, "activation_bits": 8},
        "arguments": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True,
                      "bf16": True},
        "stages": {},
    }  # fmt: skip
    one, other = run("exact", 2, **options)
    assert_ranks_agree(one, other)


@pytest.mark.slow
@needs_gloo
def test_fsdp2_equals_a_single_process(run, single):
    arguments = {**COMPLETE_RUN["arguments"], **FSDP2}
    one, other = run("two", 2, **{**COMPLETE_RUN, "arguments": arguments})
    assert_ranks_agree(one, other)
    assert_close(one, single)
    # All parameters of the dense model were sharded; in the stages all but those of packed layers
    # and their biases.
    dense = len(list(make_stacked("bert", 3).parameters()))
    assert one["sharded"][0] == dense
    assert dense > one["sharded"][1] > one["sharded"][2] > one["sharded"][3] > 0
    assert one["logs"] and one["logs"][0]["noised_share"] == single["logs"][0]["noised_share"]
    # The saved model loads as it is in memory.
    loaded = AutoModelForSequenceClassification.from_pretrained(run.folder / "two-saved")
    state = loaded.state_dict()
    for name, tensor in one["model"].items():
        assert torch.equal(state[name], tensor), name


# Codes are never renewed: a centroid that differs in its last bits could give a block another code.
TRAINED_CENTROIDS = {
    "noise": {"noise": "pq", "p": 1.0, "block_size": 4, "n_centroids": 16,
              "codebook_bits": 32, "learn_codebooks": True, "codebook_update": 1000,
              "target_modules": ".*"},
    "teacher": True,
    "config": {"stages": [".*"]},
    "stages": {"stage_epochs": 0, "distill": False},
    "arguments": {"optim": "adamw_torch", "learning_rate": 1e-3},
}  # fmt: skip


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("groups", [{}, {"frequent_rows": 0.6, "rare_block_size": 16}], ids=str)
def test_trained_centroids_equal_those_of_a_single_process(run, groups):
    options = {k: {**TRAINED_CENTROIDS[k], **groups} for k in ("noise", "config")}
    name, options = f"trained-{len(groups)}", {**TRAINED_CENTROIDS, **options}
    (single,) = run(f"single-{name}", 1, **options)
    one, other = run(f"two-{name}", 2, **options)
    assert any(key.endswith("row_groups") for key in one["model"]) == bool(groups)
    assert_ranks_agree(one, other)
    assert_close(one, single)
    books = [name for name in one["noise"] if name.endswith("codebook")]
    assert len(books) > 10
    for name in books:  # the packed model has what was trained
        packed = one["model"][name.replace(".0.codebook", ".weight_codebook")]
        assert torch.equal(packed, one["noise"][name]), name


@pytest.mark.slow
@needs_gloo
def test_trained_centroids_are_refused_under_fsdp(run):
    arguments = TRAINED_CENTROIDS["arguments"] | FSDP2
    with pytest.raises(AssertionError, match=r"learn_codebooks=True does not work under FSDP"):
        run("refused", 2, **{**TRAINED_CENTROIDS, "arguments": arguments})


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_accelerate_launch_follows_its_config_file(run, single, kind):
    """The script itself asks for neither processes nor sharding. Under FSDP only the first process
    then reads the checkpoint, and the others receive it."""
    fsdp = None
    make_stacked("bert", 3).save_pretrained(run.folder / "pretrained")
    options = {**COMPLETE_RUN, "pretrained": str(run.folder / "pretrained")}
    if kind == "fsdp2":
        fsdp = {"fsdp_cpu_ram_efficient_loading": True,
                "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_state_dict_type": "FULL_STATE_DICT"}  # fmt: skip
    launcher = partial(accelerate_launch, run.folder, fsdp=fsdp)
    one, other = run(f"launched-{kind}", 2, launcher=launcher, **options)
    assert_ranks_agree(one, other)
    assert_close(one, single)
    assert all(count > 0 for count in one["sharded"]) == (fsdp is not None)


@pytest.mark.slow
@needs_gloo
def test_fsdp2_with_all_options_agrees_on_both_ranks(run):
    options = {
        "noise": {"noise": "pq", "p": 0.2, "block_size": 4, "n_centroids": 16, "layerdrop": 0.3,
                  "codebook_update": 2, "share_layers": 2, "activation_bits": 8,
                  "frequent_rows": 0.6, "rare_block_size": 16},
        "config": {"codebook_bits": 8, "activation_bits": 8, "importance": "activations",
                   "frequent_rows": 0.6, "rare_block_size": 16},
        "stages": {"distill_hidden": 1.0, "distill_attention": 1.0},
        "arguments": {
            "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "bf16": True, **FSDP2
        },
    }  # fmt: skip
    one, other = run("all", 2, **options)
    assert_ranks_agree(one, other)
    assert all(count > 0 for count in one["sharded"])


@pytest.mark.slow
@needs_gloo
def test_fsdp2_of_a_language_model_with_a_tied_head(run):
    options = {
        "model": "gpt2", "data": "language", "noise": ALL_INT8,
        "stages": {}, "config": {"stages": ["embeddings", "attention"]},
    }  # fmt: skip
    (single,) = run("one-gpt2", 1, **options)
    one, other = run("two-gpt2", 2, **options, arguments=FSDP2)
    assert_ranks_agree(one, other)
    assert_close(one, single)


@pytest.mark.slow
@needs_gloo
def test_fsdp2_resumes(run):
    options = {
        "noise": ALL_INT8,
        "stages": {},
        "config": {"stages": ["embeddings", "attention"]},
        "arguments": {**FSDP2, "optim": "adamw_torch"},
    }
    uninterrupted, _ = run("run", 2, **options)
    with pytest.raises(FileNotFoundError):
        run("killed", 2, **options, kill=1)
    assert (run.folder / "killed" / "compression" / "run-1" / "checkpoint-2").is_dir()
    # Noise training resumes from its first checkpoint, which has a plain model; then compression.
    checkpoint = run.folder / "killed" / "checkpoint-2"
    plain = load_file(checkpoint / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in uninterrupted["dense"].items()}
    assert {name: tensor.shape for name, tensor in plain.items()} == shapes
    one, other = run("killed", 2, **options, checkpoint=str(checkpoint), resume=True)
    assert_ranks_agree(one, other)
    for part in ("dense", "model"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(tensor, uninterrupted[part][name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@needs_gloo
def test_two_processes_compile_after_an_evaluation(run):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}
    options = {
        "noise": ALL_INT8,
        "layers": 1,
        "stages": {},
        "config": {"stages": ["ffn"]},
    }
    (single,) = run("one-eager", 1, **options, arguments={"max_steps": 2})
    one, other = run("two-compiled", 2, **options, arguments=compiled)
    assert_ranks_agree(one, other)
    assert_close(one, single)
    assert all(one["compiled"]) and not any(single["compiled"])
