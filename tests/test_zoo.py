"""Noise, quantization, saving and loading for every architecture of the zoo."""

import copy
import math

import pytest
import torch
from support.files import digest
from support.stored import assert_listed, matrices
from support.zoo import ZOO, Architecture, ipq_config, tensors_of, without_dropout
from torch import nn
from transformers import PreTrainedModel

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
    remove_quant_noise,
    size_report,
)
from hf_quantnoise.noise import find_state

CONFIGS = {"ipq": ipq_config, "int4": lambda model: FixedPointConfig(bits=4)}
NOISE = QuantNoiseConfig(noise="proxy", p=0.3, block_size=4)


@pytest.fixture(params=ZOO)
def kind(request) -> Architecture:
    return ZOO[request.param]


@torch.no_grad()
def outputs(model: PreTrainedModel, batch: dict) -> dict[str, torch.Tensor]:
    return dict(tensors_of(model.eval()(**batch)))


def seeded_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    torch.manual_seed(0)
    return model.train()(**batch).loss


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def disk_bytes(folder) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_zoo_outputs_depend_on_inputs(kind):
    batch = kind.batch()
    name = next(key for key in batch if key.startswith(("input", "pixel")))
    found = outputs(kind.make(), batch)
    other = outputs(kind.make(), {**batch, name: batch[name].flip(-1)})
    assert found["loss"].isfinite()
    changes = [not torch.allclose(found[key], other[key], atol=1e-6) for key in found]
    assert any(changes), list(found)


def test_zoo_training_step_with_noise(kind):
    model, batch = without_dropout(kind.make()), kind.batch()
    plain, clean = copy.deepcopy(model), outputs(model, batch)
    classes = [type(module) for module in model.modules()]
    apply_quant_noise(model, NOISE)
    assert_same(outputs(model, batch), clean)

    state, called = find_state(model), set()
    for module in state.layers.values():
        module.register_forward_hook(lambda layer, *_: called.add(id(layer)))
    expected = seeded_loss(plain, batch)
    state.p = 0.0
    assert torch.equal(seeded_loss(model, batch), expected)
    state.p = 0.3
    loss = seeded_loss(model, batch)
    assert not torch.equal(loss, expected)
    loss.backward()
    # A weight that is read without calling its layer gets no noise.
    unreached = state.note_unreached()
    for weight in state.weights:
        calls = [id(module) in called for module in weight.modules]
        for name, module, is_called in zip(weight.names, weight.modules, calls, strict=True):
            # The forward of one tied table may serve all of them (T5, BART).
            is_called = any(calls) if isinstance(module, nn.Embedding) else is_called
            assert is_called == (name not in unreached), name
        gradient = weight.modules[0].weight.grad
        assert gradient is not None and gradient.isfinite().all(), weight.names
        assert gradient.norm() > 0, weight.names
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for weight in state.weights:
        before = plain.get_submodule(weight.names[0]).weight
        assert not torch.equal(weight.modules[0].weight, before), weight.names

    remove_quant_noise(model)
    assert [type(module) for module in model.modules()] == classes
    plain.load_state_dict(model.state_dict())  # strictly: the same keys
    assert_same(outputs(model, batch), outputs(plain, batch))


def test_zoo_layers_without_noise_are_listed(kind):
    model = apply_quant_noise(kind.make(), NOISE)
    state = find_state(model)
    for name, owner in matrices(model).items():
        reasons = [state.left_clean[key] for key in (name, owner) if key in state.left_clean]
        assert len(reasons) == (owner not in state.layers), name
        assert all(reasons)


@pytest.mark.parametrize("config", CONFIGS)
def test_zoo_logits_match_after_reload(kind, config, tmp_path):
    dense, batch = kind.make(), kind.batch()
    model = quantize_model(copy.deepcopy(dense), CONFIGS[config](dense), progress=False)
    assert_listed(model, matrices(dense))

    expected = outputs(model, batch)
    model.save_pretrained(tmp_path / "a")
    assert size_report(model).total.disk_bytes == pytest.approx(
        disk_bytes(tmp_path / "a"), rel=0.01
    )
    loader = kind.auto if config == "ipq" else AutoQuantizedModel
    again, info = loader.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert type(again) is type(model) and not any(info.values()), info
    assert_same(outputs(again, batch), expected)
    again.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_zoo_size_report_counts_every_parameter(kind, tmp_path):
    model = kind.make()
    weights = {id(p): p.numel() for p in model.parameters()}
    report = size_report(model)
    model.save_pretrained(tmp_path)
    assert report.total.disk_bytes == pytest.approx(disk_bytes(tmp_path), rel=0.01)
    rows = {row.name: row for row in report.rows}
    counted = sum(
        math.prod(rows[name].shape)
        for name, _ in model.named_parameters()
        if not rows[name].stored.startswith("tied")
    )
    assert counted == sum(weights.values())
