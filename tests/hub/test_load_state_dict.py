"""``load_state_dict`` of a packed model: from its file, a checkpoint, or another model in memory.

Files hold 8-bit centroids as codes; in memory they are floats.
"""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.stacked import inputs_of, logits, make_stacked
from support.stored import PQ, STORED, layers_of_stages, tensors_of
from transformers import Trainer, TrainingArguments

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseTrainer,
    quantize_model,
)
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.quantizers import ProductQuantizer

CONFIGS = {
    **STORED,
    "rows, 8 bits": IPQConfig(**PQ, row_scale=True, codebook_bits=8),
    "two codebooks": IPQConfig(**PQ, n_codebooks=2, codebook_bits=32),
    "two codebooks, rows, 8 bits": IPQConfig(**PQ, n_codebooks=2, row_scale=True, codebook_bits=8),
    "int4": FixedPointConfig(bits=4, observer="channel"),
    "inputs": IPQConfig(**PQ, codebook_bits=8, activation_bits=8),
}
EIGHT_BITS = [name for name in CONFIGS if getattr(CONFIGS[name], "codebook_bits", 0) == 8]


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model and return its folder."""

    def save(kind, name="bert", **changes):
        config = replace(CONFIGS[kind], **changes)
        data = [inputs_of(name)] if config.activation_bits else None
        quantize_model(
            make_stacked(name, 2), config, calibration_data=data, progress=False
        ).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@torch.no_grad()
def perturbed(model):
    """Change all floats of a model; its codes stay."""
    for tensor in model.parameters():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    return model


# torch's assign keeps the dtype of the file, so configs with float16 tensors are omitted.
ASSIGNED = ["ipq", "8 bits", "two codebooks", "int4", "inputs"]


@pytest.mark.parametrize(
    ("kind", "assign"), [(kind, False) for kind in CONFIGS] + [(kind, True) for kind in ASSIGNED]
)
def test_load_state_dict_of_own_file_restores_model(kind, assign, saved):
    folder = saved(kind, **({"leftover_bits": 32} if assign else {}))
    expected = AutoQuantizedModel.from_pretrained(folder)
    model = perturbed(AutoQuantizedModel.from_pretrained(folder))
    assert not torch.equal(logits(model), logits(expected))
    found = model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False, assign=assign
    )
    assert not found.missing_keys
    for name, tensor in tensors_of(expected).items():
        own = model.get_parameter(name)
        assert torch.equal(own, tensor) and own.dtype == tensor.dtype, name
        assert own.requires_grad == tensor.requires_grad, name
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("kind", ["8 bits", "two codebooks, rows, 8 bits"])
def test_load_state_dict_in_bfloat16_matches_from_pretrained(kind, saved):
    folder = saved(kind)
    expected = AutoQuantizedModel.from_pretrained(folder, dtype=torch.bfloat16)
    model = perturbed(AutoQuantizedModel.from_pretrained(folder, dtype=torch.bfloat16))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    for name, tensor in tensors_of(expected).items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_load_state_dict_keeps_ties(saved):
    folder = saved("8 bits", "gpt2")
    expected = AutoQuantizedModel.from_pretrained(folder)
    model = perturbed(AutoQuantizedModel.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert model.lm_head.weight_codebook is model.transformer.wte.weight_codebook
    assert torch.equal(logits(model, "gpt2"), logits(expected, "gpt2"))


@pytest.mark.parametrize("centroids_first", [True, False])
def test_load_state_dict_shard_by_shard(centroids_first, saved):
    """As ``Trainer`` does, with centroids in one and their scale and zero point in the other."""
    folder = saved("8 bits")
    tensors = load_file(folder / "model.safetensors")
    centroids = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_codebook")}
    model = perturbed(AutoQuantizedModel.from_pretrained(folder))
    shards = [centroids, tensors] if centroids_first else [tensors, centroids]
    found = model.load_state_dict(shards[0], strict=False)
    assert set(found.missing_keys) >= centroids.keys() or not centroids_first
    model.load_state_dict(shards[1], strict=False)
    assert torch.equal(logits(model), logits(AutoQuantizedModel.from_pretrained(folder)))


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_load_state_dict_from_memory_is_exact(kind, saved):
    """As in a running compression, centroids in memory are finer than stored ones."""
    folder = saved(kind)
    model = perturbed(AutoQuantizedModel.from_pretrained(folder))
    memory = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = AutoQuantizedModel.from_pretrained(folder)
    again.load_state_dict(memory)  # strictly
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, memory[name]), name


def test_load_state_dict_refuses_codes_for_float_centroids(saved):
    codes = load_file(saved("8 bits") / "model.safetensors")
    model = AutoQuantizedModel.from_pretrained(saved("ipq"))
    before = {
        name: layer.weight_codebook.clone()
        for name, layer in packed_layers(model)
        if isinstance(layer.quantizer, ProductQuantizer)
    }
    with pytest.raises(RuntimeError, match=r"weight_codebook.*uint8.*pq 16x4"):
        model.load_state_dict(codes, strict=False)
    for name, codebook in before.items():
        assert torch.equal(model.get_submodule(name).weight_codebook, codebook), name


# ---- Trainer -------------------------------------------------------------------------------------


@pytest.fixture
def data(parity_data):
    few = parity_data.select(range(32))
    return {"train_dataset": few, "eval_dataset": few}


def arguments(folder, steps=4, **more):
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, eval_steps=2, eval_strategy="steps",
        learning_rate=1e-3, per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True,
        report_to="none", **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["ipq", "8 bits", "rows", "two codebooks, rows, 8 bits", "int4", "inputs"]
)
def test_trainer_resumes_and_loads_best_model(kind, saved, data):
    folder = saved(kind)
    best = arguments(folder / "run", load_best_model_at_end=True)
    model = AutoQuantizedModel.from_pretrained(folder)
    first = Trainer(model, best, **data)
    first.train()
    assert first.evaluate()["eval_loss"] == first.state.best_metric
    checkpoint = first.state.best_model_checkpoint
    assert torch.equal(logits(model), logits(AutoQuantizedModel.from_pretrained(checkpoint)))

    last = AutoQuantizedModel.from_pretrained(folder / "run" / "checkpoint-4")
    resumed = AutoQuantizedModel.from_pretrained(folder)
    trainer = Trainer(resumed, arguments(folder / "run"), **data)
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    rounded = getattr(CONFIGS[kind], "codebook_bits", 32) < 32 or getattr(
        CONFIGS[kind], "row_scale", False
    )
    tolerance = 0.02 if rounded else 0.0
    torch.testing.assert_close(logits(resumed), logits(last), rtol=0, atol=tolerance)
    for (name, one), other in zip(last.named_parameters(), resumed.parameters(), strict=True):
        if name.endswith("_codebook"):
            torch.testing.assert_close(other.std(), one.std(), rtol=0.05, atol=0)


def test_compress_train_and_resume_with_8_bits(tmp_path, data):
    config = IPQConfig(**PQ, codebook_bits=8, stages=["ffn"])
    trainer = QuantNoiseTrainer(make_stacked("bert", 2), arguments(tmp_path / "run"), **data)
    packed = trainer.compress(config, CompressionArguments(stage_epochs=0, plots=False))
    second = copy.deepcopy(packed)
    trainer.train()
    again = QuantNoiseTrainer(second, arguments(tmp_path / "run"), **data)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(logits(second), logits(trainer.model), rtol=0, atol=0.02)
    pairs = zip(layers_of_stages(second), layers_of_stages(trainer.model), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(
            one.weight_codebook.std(), other.weight_codebook.std(), rtol=0.05, atol=0
        )
