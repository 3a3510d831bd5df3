"""Models with PEFT adapters: noise works on them, packing refuses them before anything is done."""

import copy

import pytest
import torch
from support.stacked import logits, make_stacked
from support.trainers import make_trainer

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    allocate_bits,
    quantize_model,
)
from hf_quantnoise.compression import check_compression
from hf_quantnoise.modeling.packer import ModelPacker
from hf_quantnoise.noise import find_state

peft = pytest.importorskip("peft", reason="peft is not installed (pip install hf-quantnoise[test])")

CONFIG = IPQConfig(block_size=4, n_centroids=8, stages=["ffn"])
ONE_STEP = CompressionArguments(stage_steps=1, plots=False)


def wrapped():
    adapter = peft.LoraConfig(target_modules=["query", "dense"], task_type="SEQ_CLS")
    return peft.get_peft_model(make_stacked("bert", 2), adapter)


def inner():
    """The model inside of PEFT's wrapper: its layers are wrapped, too."""
    return wrapped().get_base_model()


def by_transformers():
    model = make_stacked("bert", 2)
    model.add_adapter(peft.LoraConfig(target_modules=["query", "dense"]))
    return model


def prompt():
    tuning = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    return peft.get_peft_model(make_stacked("bert", 2), tuning)


@pytest.mark.parametrize("make", [wrapped, inner, by_transformers, prompt])
def test_adapters_are_refused_before_anything_is_packed(make, tmp_path, parity_data):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model, parity_data)
    for pack in (
        lambda: trainer.compress(CONFIG, ONE_STEP),
        lambda: check_compression(trainer, CONFIG, ONE_STEP),
        lambda: quantize_model(model, FixedPointConfig(), progress=False),
        lambda: ModelPacker(model, CONFIG),
        lambda: allocate_bits(model, IPQConfig(target_size_mb=0.05)),
    ):
        with pytest.raises(ValueError, match=r"PEFT adapters.*merge_and_unload\(\)"):
            pack()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("noise", [None, QuantNoiseConfig(p=0.5)], ids=["no noise", "noise"])
def test_a_trained_and_merged_model_is_compressed(noise, tmp_path, parity_data, caplog):
    trainer = make_trainer(tmp_path, wrapped(), parity_data, noise, max_steps=2)
    assert caplog.text.count("trainer.model = trainer.model.merge_and_unload()") == 1
    trainer.train()
    assert (find_state(trainer.model) is not None) == (noise is not None)
    trainer.model = trainer.model.merge_and_unload()
    small = trainer.compress(CONFIG, ONE_STEP)
    small.save_pretrained(tmp_path / "small")
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(small))


def test_a_teacher_that_has_the_adapters_of_the_student_is_refused(tmp_path, parity_data):
    """PEFT adds them to the layers of the model that it wraps."""
    adapter = peft.LoraConfig(target_modules=["query", "dense"], task_type="SEQ_CLS")
    base = make_stacked("bert", 2)
    separate = copy.deepcopy(base)
    student = peft.get_peft_model(base, adapter)
    with pytest.raises(ValueError, match=r"invalid teacher.*deepcopy\(model\), made before"):
        make_trainer(tmp_path, student, parity_data, parts={"teacher": base})
    make_trainer(tmp_path, student, parity_data, parts={"teacher": separate}, max_steps=1).train()


def test_a_packed_model_with_an_adapter_trains_without_a_warning(tmp_path, parity_data, caplog):
    packed = quantize_model(make_stacked("bert", 1), FixedPointConfig(), progress=False)
    model = peft.get_peft_model(packed, peft.LoraConfig(target_modules=["query"]))
    make_trainer(tmp_path, model, parity_data, max_steps=1).train()
    assert "merge_and_unload" not in caplog.text
