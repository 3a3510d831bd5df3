"""Parameters that are never trained stay so in copies of a model and after loading."""

import copy
import io

import pytest
import torch
from support.stacked import make_stacked
from support.stored import PQ, tensors_of
from torch import nn

from hf_quantnoise import AutoQuantizedModel, IPQConfig, quantize_model
from hf_quantnoise.modeling.non_trainable import NonTrainableParameter

FIXED = ("weight_indices", "weight_codebook_scale", "weight_codebook_zero_point", "input_scale",
         "input_zero_point")  # fmt: skip


@pytest.fixture(scope="module")
def packed():
    config = IPQConfig(**PQ, codebook_bits=8, activation_bits=8)
    data = [{"input_ids": torch.arange(5, 21).view(2, 8)}]
    return quantize_model(make_stacked("gpt2", 1), config, calibration_data=data, progress=False)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(model):
    """Return the model after a load with ``assign=True``."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(own, assign=True)
    model.tie_weights()  # torch unties
    return model


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "dtype": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "assign": lambda model: assigned(copy.deepcopy(model)),
}


@pytest.mark.parametrize("way", COPIES)
def test_requires_grad_leaves_non_trainable_parameters(way, packed):
    model = COPIES[way](packed)
    seen = set()
    for flag in (False, True):
        for name, tensor in tensors_of(model).items():
            tensor.requires_grad_(flag)  # one by one, as PEFT does
            leaf = name.rpartition(".")[2]
            assert isinstance(tensor, NonTrainableParameter) == (leaf in FIXED), name
            assert tensor.requires_grad == (flag and leaf not in FIXED), name
            seen.add(leaf)
    assert seen >= set(FIXED)
    assert model.lm_head.weight_indices is model.transformer.wte.weight_indices
    assert not any(isinstance(each, nn.Parameter) for each in model.state_dict().values())
    trained = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    assert trained.isdisjoint(FIXED)


def test_dequantized_model_has_no_non_trainable_parameters(packed):
    dense = copy.deepcopy(packed).dequantize()
    assert {type(tensor) for tensor in dense.parameters()} == {nn.Parameter}
    assert not any(isinstance(buffer, nn.Parameter) for buffer in dense.buffers())


def test_state_dict_pickles_as_regular_tensors(packed):
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in loaded.values())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors_of(packed).items())


@pytest.mark.parametrize("calls", [0, 1, 30])
def test_failed_conversion_keeps_every_tensor(calls, packed, tmp_path):
    """A device that runs out of memory: the model still has all codes, and saves them."""
    model = copy.deepcopy(packed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.transformer.h[0].mlp.c_fc
    left = iter(range(calls))

    def convert(tensor):
        if next(left, None) is None:
            raise RuntimeError("out of memory")
        return tensor

    with pytest.raises(RuntimeError, match="out of memory"):
        model._apply(convert)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name, _ in layer.named_buffers()} == {
        *("weight_indices", "weight_codebook_scale", "weight_codebook_zero_point"),
        *("input_scale", "input_zero_point"),
    }
    model.save_pretrained(tmp_path)
    again = AutoQuantizedModel.from_pretrained(tmp_path)
    ids = torch.arange(5, 21).view(2, 8)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, packed(ids).logits)
