"""Target sizes of models with values that float16 cannot hold, which take more bytes."""

import copy
import os

import pytest
import torch
from support.tiny import make_model, make_vision_model

from hf_quantnoise import IPQConfig, quantize_model
from hf_quantnoise.compression import file_bytes, plan_bit_allocation, smallest_bytes
from hf_quantnoise.compression.bit_allocation import allocate

SMALL = {"kmeans_iter": 2}


def with_large_values(kind):
    model = make_vision_model("resnet") if kind == "running statistics" else make_model("bert")
    tensors = model.state_dict()
    ends = {
        "weights": ("dense.weight", "query.weight", "embeddings.weight"),
        "norms": ("LayerNorm.weight",),
        "head": ("classifier.weight", "pooler.dense.bias"),
        "tiny weights": ("intermediate.dense.weight",),
        "running statistics": ("running_var",),
    }
    for name, tensor in tensors.items():
        if name.endswith(ends[kind]):
            if kind == "tiny weights":
                tensor.mul_(1e-6)
            else:
                tensor.view(-1)[0] = 1e5
    return model


def saved_bytes(model, folder):
    model.save_pretrained(folder)
    return os.path.getsize(folder / "model.safetensors")


KINDS = ["weights", "norms", "head", "tiny weights", "running statistics"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leftover_bits", [8, 16])
def test_file_bytes_counts_values_that_float16_cannot_hold(kind, leftover_bits, tmp_path):
    model = with_large_values(kind)
    config = IPQConfig(block_size=4, n_centroids=8, leftover_bits=leftover_bits, **SMALL)
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    expected = file_bytes(model, config)
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == i and torch.equal(after[n], t) for n, (i, t) in before.items())
    assert saved_bytes(quantize_model(model, config, progress=False), tmp_path) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_large_values_never_exceed_the_target(kind, tmp_path):
    model = with_large_values(kind)
    smallest = smallest_bytes(model, IPQConfig(target_size_mb=1, **SMALL))
    for more in (0, 200):
        target = smallest + more
        config = IPQConfig(target_size_mb=(target + 0.5) / 1e6, **SMALL)
        small = quantize_model(copy.deepcopy(model), config, progress=False)
        assert saved_bytes(small, tmp_path / str(more)) <= target
    with pytest.raises(ValueError, match=f"smallest bit allocation takes {smallest:,}"):
        config = IPQConfig(target_size_mb=(smallest - 0.5) / 1e6, **SMALL)
        quantize_model(copy.deepcopy(model), config, progress=False)


def test_plan_bit_allocation_refuses_a_result_above_the_target(monkeypatch):
    model = make_model("bert")
    target = smallest_bytes(model, IPQConfig(target_size_mb=1, **SMALL)) - 1
    monkeypatch.setattr(allocate, "check_target_reachable", lambda model, config: target)
    with pytest.raises(ValueError, match=rf"it allows {target:,} bytes, .* takes {target + 1:,} "):
        plan_bit_allocation(model, IPQConfig(target_size_mb=target / 1e6, **SMALL), progress=False)
