"""A model is packed completely, or it is what it was before: quantize_model, compress, loading."""

import copy
import itertools

import pytest
import torch
from support.memory import live_bytes
from support.stacked import make_stacked
from support.tiny import make_model
from support.trainers import make_trainer
from torch import nn
from transformers import AutoModelForMaskedLM

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    allocate_bits,
    apply_quant_noise,
    quantize_model,
)
from hf_quantnoise.compression import check_plan
from hf_quantnoise.modeling import packed_layers, packer
from hf_quantnoise.modeling.rollback import ModelSnapshot
from hf_quantnoise.noise import find_state

IPQ = {"block_size": 4, "n_centroids": 16, "kmeans_iter": 2}
BATCHES = [{"input_ids": torch.randint(5, 320, (2, 9), generator=torch.Generator().manual_seed(0))}]
STAGES = ["ffn", "embeddings", "attention"]


def state_of(model: nn.Module) -> dict:
    """Return all that must not change, with the parameters themselves and the bits of each."""
    modules = {
        name: (type(module), module.training, sorted(map(str, vars(module))))
        for name, module in model.named_modules(remove_duplicate=False)
    }
    hooks = {
        name: (len(module._forward_hooks), len(module._state_dict_hooks))
        for name, module in model.named_modules()
    }
    parameters = {
        name: (id(value), value.requires_grad)
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    return {
        "modules": modules,
        "hooks": hooks,
        "parameters": parameters,
        "config": copy.deepcopy(model.config.to_dict()),
        "ties": (dict(model.all_tied_weights_keys), copy.copy(model._tied_weights_keys)),
        "tags": copy.copy(model.model_tags),
        "noise": find_state(model),
    }


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, state, bits):
    found = state_of(model)
    for key, value in state.items():
        assert found[key] == value, key
    assert found["parameters"].keys() == state["parameters"].keys()
    now = model.state_dict()
    assert now.keys() == bits.keys()
    assert all(torch.equal(now[name], bits[name]) for name in bits)
    assert not any(packed_layers(model)) and not getattr(model, "is_quantized", False)


@pytest.fixture
def fail(monkeypatch):
    """Return a function that makes ``packer.<name>`` raise an error at its n-th call."""

    def arrange(name, call, error):
        real, calls = getattr(packer, name), itertools.count(1)

        def failing(*args, **kwargs):
            if next(calls) == call:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(packer, name, failing)
        return lambda: monkeypatch.setattr(packer, name, real)

    return arrange


CONFIGS = {
    "ipq": lambda: IPQConfig(**IPQ),
    "fixed point": lambda: FixedPointConfig(bits=4),
    "pruned and shared": lambda: IPQConfig(**IPQ, prune_layers="every_other", share_layers=2),
    "weighted": lambda: IPQConfig(**IPQ, importance="activations", activation_bits=8),
    "target": lambda: IPQConfig(target_size_mb=0.1, kmeans_iter=2),
}
ERRORS = [KeyboardInterrupt(), RuntimeError("CUDA out of memory"), ValueError("of a quantizer")]
# (function of the packer, call at which it raises)
MOMENTS = [("pack_layer", 1), ("pack_layer", 4), ("declare_shared", 1), ("declare_shared", 2)]


@pytest.mark.parametrize(
    ("name", "config"), [("gpt2", "ipq"), *(("bert-mlm", config) for config in CONFIGS)]
)
def test_quantize_model_restores_model_on_any_error(name, config, fail):
    model = make_stacked("bert", 4) if config == "pruned and shared" else make_model(name)
    before, bits = state_of(model), bits_of(model)
    for (function, call), error in zip(MOMENTS, itertools.cycle(ERRORS)):
        if config == "fixed point" and (function, call) == MOMENTS[-1]:
            continue  # it has a single stage
        undo = fail(function, call, error)
        with pytest.raises(type(error)):
            quantize_model(model, CONFIGS[config](), False, BATCHES)
        undo()
        assert_unchanged(model, before, bits)
    expected = quantize_model(copy.deepcopy(model), CONFIGS[config](), False, BATCHES)
    found = quantize_model(model, CONFIGS[config](), False, BATCHES)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.parametrize("share", [1, 2])
def test_quantize_model_restores_noise(share, fail):
    model = make_stacked("bert", 4)
    apply_quant_noise(model, QuantNoiseConfig(block_size=4, share_layers=share, layerdrop=0.1))
    before, bits = state_of(model), bits_of(model)
    fail("pack_layer", 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, IPQConfig(**IPQ), False)
    assert_unchanged(model, before, bits)
    torch.manual_seed(0)
    model.train()(**BATCHES[0]).logits.sum().backward()  # still noisy
    assert find_state(model).layers


def test_calibration_that_fails_restores_model(monkeypatch):
    model = make_model("bert")
    before, bits = state_of(model), bits_of(model)
    # The checks before packing pass; then the inputs of a packed layer are infinite.
    monkeypatch.setattr(
        packer.ModelPacker, "require_runs", lambda *args: model.register_buffer("unused", None)
    )
    batches = [{"inputs_embeds": torch.full((1, 3, 32), float("nan"))}]
    with pytest.raises(ValueError, match=r"activation_bits: .*encoder\.layer\.0"):
        quantize_model(model, FixedPointConfig(activation_bits=8), False, batches)
    assert_unchanged(model, before, bits)


def test_snapshot_copies_no_tensors():
    assert (
        live_bytes(lambda: ModelSnapshot(make_model("bert"))).left
        == live_bytes(lambda: make_model("bert")).left
    )


# ---- weights are checked by name before the first is packed -------------------------------------

LATE = "bert.encoder.layer.1.attention.output.dense"
INVALID = {
    "nan": (float("nan"), {}, "NaN or infinite"),
    "infinite": (float("-inf"), {}, "NaN or infinite"),
    "too large": (2e19, {}, "largest magnitude is 2e[+]19"),
    "too large for row scale": (
        1e9,
        {"row_scale": True, "codebook_bits": 32},
        "row_scale=True.*row_scale=False",
    ),
}


def invalid_model(value):
    model = make_model("bert-mlm")
    model.get_submodule(LATE).weight.data[3, 5] = value
    return model


@pytest.mark.parametrize("name", INVALID)
def test_invalid_weight_is_named_before_packing(name, monkeypatch):
    value, settings, words = INVALID[name]
    model = invalid_model(value)
    bits = bits_of(model)
    monkeypatch.setattr(packer, "pack_layer", None)
    for call in (quantize_model, check_plan):
        with pytest.raises(ValueError, match=rf"invalid {LATE}\.weight: .*{words}"):
            call(model, IPQConfig(**IPQ, **settings))
    assert all(v.equal(bits[n]) or v.isnan().any() for n, v in model.state_dict().items())
    assert not any(packed_layers(model))


def test_nan_is_named_by_every_entry_point(tmp_path):
    match = rf"invalid {LATE}\.weight: 1 of 1024 entries are NaN or infinite"
    model = invalid_model(float("nan"))
    with pytest.raises(ValueError, match=match):
        allocate_bits(model, IPQConfig(target_size_mb=0.1), progress=False)
    for noise in ("pq", "mean", "int8"):
        with pytest.raises(ValueError, match=match):
            apply_quant_noise(model, QuantNoiseConfig(noise=noise, block_size=4, n_centroids=8))
        assert find_state(model) is None
    with pytest.raises(ValueError, match=match):
        quantize_model(model, FixedPointConfig(), False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=match):
        AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=IPQConfig(**IPQ))


@pytest.mark.parametrize("noise", ["pq", "mean", "int8"])
def test_update_of_noise_names_a_weight_that_became_nan(noise):
    model = make_model("bert-mlm")
    apply_quant_noise(model, QuantNoiseConfig(noise=noise, block_size=4, n_centroids=8))
    model.get_submodule(LATE).weight.data[0, 0] = float("nan")
    state = find_state(model)
    with pytest.raises(ValueError, match=rf"invalid {LATE}\.weight: 1 of 1024"):
        state.refresh_scales() if noise == "int8" else state.refresh_codebooks()


def test_weights_of_other_dtypes_are_skipped_with_the_reason():
    model = make_model("bert")
    layer = model.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    quantize_model(model, FixedPointConfig(), False)
    config = model.config.quantization_config
    assert config.left_dense["bert.encoder.layer.0.output.dense"] == (
        "its weight is stored as torch.float8_e4m3fn"
    )


# ---- compression runs ----------------------------------------------------------------------------


def compress(trainer, **changes):
    settings = {"stages": STAGES, **IPQ, **changes}
    return trainer.compress(IPQConfig(**settings), CompressionArguments(stage_steps=1))


def test_compress_checks_weights_before_it_trains(tmp_path, parity_data, monkeypatch):
    trainer = make_trainer(tmp_path, invalid_model_for_classes(), parity_data)
    before = state_of(trainer.model)
    monkeypatch.setattr("hf_quantnoise.compression.stages.StageTrainer.train", None)
    monkeypatch.setattr("hf_quantnoise.compression.stages.measure_stage", None)
    with pytest.raises(ValueError, match=rf"invalid {LATE}\.weight"):
        compress(trainer)
    assert state_of(trainer.model) == before


def invalid_model_for_classes():
    model = make_model("bert")
    model.get_submodule(LATE).weight.data[3, 5] = float("nan")
    return model


@pytest.mark.parametrize(
    ("changes", "call"), [({}, 3), ({"prune_layers": "every_other"}, 1)], ids=["plain", "pruned"]
)
def test_interrupt_in_the_first_stage_restores_the_dense_model(
    changes, call, tmp_path, parity_data, fail
):
    trainer = make_trainer(tmp_path, make_model("bert"), parity_data)
    before, bits = state_of(trainer.model), bits_of(trainer.model)
    undo = fail("pack_layer", call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compress(trainer, **changes)
    assert_unchanged(trainer.model, before, bits)
    undo()
    assert any(packed_layers(compress(trainer, **changes)))  # the retry works


def test_interrupt_in_a_later_stage_restores_the_result_of_the_stage_before(
    tmp_path, parity_data, fail
):
    trainer = make_trainer(tmp_path, make_model("bert"), parity_data)
    model, finished = trainer.model, []
    fail("pack_layer", 6, KeyboardInterrupt())  # the second table, after 4 weights of ffn
    with pytest.raises(KeyboardInterrupt):
        trainer.compress(
            IPQConfig(**IPQ, stages=STAGES),
            CompressionArguments(stage_steps=1),
            report=lambda record: finished.append((state_of(model), bits_of(model))),
        )
    assert len(finished) == 2  # dense, ffn
    state, bits = finished[-1]
    assert state_of(model) == state
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert {name.split(".")[-2] for name, _ in packed_layers(model)} == {"intermediate", "output"}


@pytest.mark.parametrize("field", ["importance", "activation_bits"])
def test_compress_checks_calibration_before_it_trains(field, tmp_path, parity_data, monkeypatch):
    model = make_model("bert")
    model.bert.encoder.layer[1].attention.extra = nn.Linear(32, 64)  # never called
    trainer = make_trainer(tmp_path, model, parity_data)
    before, bits = state_of(model), bits_of(model)
    monkeypatch.setattr("hf_quantnoise.compression.stages.StageTrainer.train", None)
    monkeypatch.setattr("hf_quantnoise.compression.stages.measure_stage", None)
    value = {"importance": "activations", "activation_bits": 8}[field]
    with pytest.raises(ValueError, match=rf"{field}: .*attention\.extra never ran"):
        compress(trainer, **{field: value})
    assert_unchanged(model, before, bits)
