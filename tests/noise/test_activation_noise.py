"""activation_bits: inputs are observed, then rounded, in training only."""

import pytest
import torch
from support.tiny import make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise, remove_quant_noise
from hf_quantnoise.compat import in_backward
from hf_quantnoise.noise import find_state


def noisy(p=0.5, calibration=2, bits=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    config = QuantNoiseConfig(
        noise="proxy", p=p, activation_bits=bits, activation_calibration=calibration
    )
    return apply_quant_noise(model, config).train()


def seen_by(layer, model, inputs):
    """Return the input that the original forward of a layer gets."""
    received = []
    original = nn.Linear.forward

    def spy(self, x):
        if self is layer:
            received.append(x.detach().clone())
        return original(self, x)

    nn.Linear.forward = spy
    try:
        model(inputs)
    finally:
        nn.Linear.forward = original
    return received[0]


def test_inputs_are_observed_then_rounded_within_their_range():
    model = noisy()
    first, second = torch.randn(8, 16), 2 * torch.randn(8, 16)
    assert torch.equal(seen_by(model[0], model, first), first)
    assert torch.equal(seen_by(model[0], model, second), second)
    both = torch.cat([first, second]).double()
    scale = (both.max() - both.min()) / 15
    zero = torch.round(both.min() / scale)
    third = torch.randn(8, 16)
    expected = ((third.double() / scale - zero).round().clamp(0, 15) + zero) * scale
    torch.testing.assert_close(
        seen_by(model[0], model, third).double(), expected, rtol=1e-4, atol=1e-5
    )
    assert seen_by(model[2], model, third).unique().numel() <= 16
    # The range is fixed after calibration.
    model(100 * third)
    assert seen_by(model[0], model, 100 * third).abs().max() < 2 * both.abs().max()


def test_input_passed_by_name_is_rounded():
    class ByName(nn.Sequential):
        def forward(self, inputs):
            return self[1](input=self[0](input=inputs))

    by_name, by_place = (noisy(p=1.0, calibration=1) for _ in range(2))
    del by_name[1], by_place[1]
    by_name.__class__ = ByName
    for inputs in torch.randn(2, 8, 16):
        assert torch.equal(by_name(inputs), by_place(inputs))
    assert find_state(by_name).activations["0"].seen == 1


def test_activation_noise_is_off_in_eval_and_at_p_0():
    model = noisy(calibration=1)
    inputs = torch.randn(8, 16)
    model(inputs)
    assert torch.equal(seen_by(model[0], model.eval(), inputs), inputs)
    find_state(model).p = 0.0
    assert torch.equal(seen_by(model[0], model.train(), inputs), inputs)
    remove_quant_noise(model)
    assert torch.equal(seen_by(model[0], model, inputs), inputs)


def test_state_dict_holds_the_ranges(input_ids):
    config = QuantNoiseConfig(activation_bits=8, activation_calibration=1)
    first = apply_quant_noise(make_model("bert"), config).train()
    other = apply_quant_noise(make_model("bert"), config).train()
    first(input_ids)
    tensors = {key: value.clone() for key, value in find_state(first).state_dict().items()}
    find_state(other).load_state_dict(tensors)
    for name, noise in find_state(other).activations.items():
        assert noise.seen == 1
        assert noise.range == find_state(first).activations[name].range
    assert not any(
        isinstance(find_state(other).layers[n], nn.Embedding) for n in find_state(other).activations
    )
    assert other.state_dict().keys() == make_model("bert").state_dict().keys()
    torch.manual_seed(1)
    one = first(input_ids).logits
    torch.manual_seed(1)
    assert torch.equal(one, other(input_ids).logits)


def test_gradients_are_zero_outside_the_range():
    model = noisy(calibration=1)
    model(torch.ones(1, 16) * torch.linspace(-1, 1, 16))
    inputs = torch.full((1, 16), 5.0, requires_grad=True)
    model(inputs).sum().backward()
    assert torch.equal(inputs.grad, torch.zeros_like(inputs))


class Repeated(nn.Module):
    """One layer, called three times per forward, each time in a separate checkpoint."""

    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(8, 8), reentrant
        self.calls = []  # (input of the layer, whether it is a recomputation)

    def forward(self, inputs):
        for _ in range(3):
            inputs = checkpoint(self.layer, inputs, use_reentrant=self.reentrant)
        return inputs


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("calibration", [1, 3, 4])
def test_recomputed_forward_gets_the_same_input(calibration, reentrant, monkeypatch):
    model = Repeated(reentrant)
    config = QuantNoiseConfig(
        noise="int8", p=1, activation_bits=2, activation_calibration=calibration
    )
    apply_quant_noise(model, config).train()
    original = nn.Linear.forward

    def spy(self, x):
        model.calls.append((x.detach().clone(), in_backward()))
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", spy)
    (noise,) = find_state(model).activations.values()
    for step in range(1, 4):
        model.calls = []
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
        forwards = [x for x, recomputed in model.calls if not recomputed]
        recomputations = [x for x, recomputed in model.calls if recomputed]
        assert len(forwards) == len(recomputations) == 3
        for one, other in zip(forwards, reversed(recomputations), strict=True):
            assert torch.equal(one, other)
        assert noise.seen == min(calibration, 3 * step)  # recomputations do not count
        rounded = [x.unique().numel() <= 4 for x in forwards]
        assert rounded == [3 * (step - 1) + call >= calibration for call in range(3)]


def test_invalid_activation_bits_raise():
    with pytest.raises(ValueError, match=r"activation_bits.*16"):
        QuantNoiseConfig(activation_bits=16)
