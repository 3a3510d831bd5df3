"""activation_bits of the noise: inputs are watched, then rounded, in training only."""

import pytest
import torch
from tiny import make_model
from torch import nn

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise, remove_quant_noise
from hf_quantnoise.noise import find_state


def noisy(p=0.5, calibration=2, bits=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    config = QuantNoiseConfig(
        noise="proxy", p=p, activation_bits=bits, activation_calibration=calibration
    )
    return apply_quant_noise(model, config).train()


def seen_by(layer, model, inputs):
    """What the original forward of a layer was given."""
    got = []
    original = nn.Linear.forward

    def spy(self, given):
        if self is layer:
            got.append(given.detach().clone())
        return original(self, given)

    nn.Linear.forward = spy
    try:
        model(inputs)
    finally:
        nn.Linear.forward = original
    return got[0]


def test_inputs_are_watched_then_rounded_between_their_extremes():
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
    # Fixed from here on.
    model(100 * third)
    assert seen_by(model[0], model, 100 * third).abs().max() < 2 * both.abs().max()


def test_evaluation_and_p_0_are_clean():
    model = noisy(calibration=1)
    inputs = torch.randn(8, 16)
    model(inputs)
    assert torch.equal(seen_by(model[0], model.eval(), inputs), inputs)
    find_state(model).p = 0.0
    assert torch.equal(seen_by(model[0], model.train(), inputs), inputs)
    remove_quant_noise(model)
    assert torch.equal(seen_by(model[0], model, inputs), inputs)


def test_the_range_travels_with_the_noise_s_state(input_ids):
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


def test_gradients_stop_outside_of_the_range():
    model = noisy(calibration=1)
    model(torch.ones(1, 16) * torch.linspace(-1, 1, 16))
    inputs = torch.full((1, 16), 5.0, requires_grad=True)
    model(inputs).sum().backward()
    assert torch.equal(inputs.grad, torch.zeros_like(inputs))


def test_bad_bits_are_refused():
    with pytest.raises(ValueError, match="activation_bits=16 must be an integer from 1 to 8"):
        QuantNoiseConfig(activation_bits=16)
