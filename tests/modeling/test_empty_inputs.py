"""Layers that are called without rows: experts without tokens, adapters of other languages (X-MOD).

Empty inputs count for nothing.
"""

import pytest
import torch
from support.stacked import TOKENS, without_dropout
from support.tiny import SIZES
from torch import nn
from transformers import XmodConfig, XmodForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import (
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    apply_quant_noise,
    quantize_model,
)
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.activations import InputObserver, calibrate, require_runs
from hf_quantnoise.modeling.convert import pack_layer
from hf_quantnoise.modeling.importance import measure_importance, require_measurable
from hf_quantnoise.noise import find_state
from hf_quantnoise.quantizers.additive import AdditiveQuantizer
from hf_quantnoise.quantizers.fixed_point import FixedPointQuantizer
from hf_quantnoise.quantizers.product import ProductQuantizer

# Layer, block size, shape of its empty inputs.
LAYERS = {
    "linear": (lambda: nn.Linear(16, 32), 4, (0, 16)),
    "linear, positions": (lambda: nn.Linear(16, 32), 4, (2, 0, 16)),
    "conv1d of gpt2": (lambda: Conv1D(32, 16), 4, (0, 16)),
    "table": (lambda: nn.Embedding(40, 16, padding_idx=0), 4, (2, 0)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3), 3, (0, 8, 5)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3), 9, (0, 8, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), 9, (0, 8, 5, 5)),
}
QUANTIZERS = {
    "product": lambda size: ProductQuantizer(block_size=size, n_centroids=4),
    "additive": lambda size: AdditiveQuantizer(block_size=size, n_centroids=4),
    "int8": lambda size: FixedPointQuantizer(bits=8),
    "int4": lambda size: FixedPointQuantizer(bits=4, observer="channel"),
}
NOISES = {
    "proxy": {"noise": "proxy"},
    "mean": {"noise": "mean"},
    "pq": {"noise": "pq", "n_centroids": 4},
    "int8": {"noise": "int8", "activation_bits": 8},
}


def empty(name):
    shape = LAYERS[name][2]
    return torch.zeros(shape, dtype=torch.long if name == "table" else torch.float32)


def some(name):
    """Inputs with rows."""
    shape = [size or 3 for size in LAYERS[name][2]]
    return torch.randint(1, 40, shape) if name == "table" else torch.randn(shape)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", LAYERS)
def test_noised_layers_take_empty_inputs(name, noise):
    make, block_size, _ = LAYERS[name]
    layer = nn.Sequential(make())
    expected = layer(empty(name)).shape
    config = QuantNoiseConfig(p=1.0, block_size=block_size, target_modules=["0"], **NOISES[noise])
    apply_quant_noise(layer.train(), config)
    for _ in range(3):
        output = layer(empty(name))
        assert output.shape == expected
        output.sum().backward()
    layer(some(name)).sum().backward()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", LAYERS)
def test_packed_layers_take_empty_inputs(name, quantizer):
    make, block_size, _ = LAYERS[name]
    layer = make()
    expected = layer(empty(name)).shape
    bits = None if name == "table" else 8
    pack_layer([layer], QUANTIZERS[quantizer](block_size), activation_bits=bits)
    with torch.no_grad():
        assert layer(empty(name)).shape == expected
    output = layer(empty(name))
    assert output.shape == expected
    output.sum().backward()


def test_activation_noise_is_calibrated_by_inputs_with_rows():
    config = QuantNoiseConfig(noise="int8", p=1.0, activation_bits=8, target_modules=["0"])
    torch.manual_seed(0)
    batches = [torch.randn(3, 16) for _ in range(60)]
    states = []
    for between in (torch.zeros(0, 16), None):
        model = nn.Sequential(nn.Linear(16, 32)).train()
        apply_quant_noise(model, config)
        for batch in batches:
            if between is not None:
                model(between)
            model(batch)
        states.append(find_state(model).state_dict())
    names = [name for name in states[0] if ".input." in name]
    assert len(names) == 3
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)


def test_input_observer_ignores_empty_inputs():
    observers = InputObserver(), InputObserver()
    values = torch.randn(5, 4)
    for fixed in (False, True):
        for observer in observers:
            observer.bins_are_fixed = fixed
            observer.observe(None, (values,), {})
        observers[0].observe(None, (), {"input": values[:0]})
    assert torch.equal(observers[0].counts, observers[1].counts)
    for key, value in observers[0].state(8).items():
        assert torch.equal(value, observers[1].state(8)[key])


class Routed(nn.Module):
    """Each expert gets the rows that are assigned to it."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, rows, experts):
        parts = [expert(rows[experts == n]) for n, expert in enumerate(self.experts)]
        return torch.cat(parts)


def routed_batch(*experts):
    return {"rows": torch.randn(len(experts), 16), "experts": torch.tensor(experts)}


def test_experts_without_rows_are_not_measured():
    model = Routed()
    batches = [routed_batch(0, 0, 1), routed_batch(0, 0)]
    groups = [[expert] for expert in model.experts]

    def forward(batch):
        return model(**batch)

    require_runs(model, model.experts[:2], batches, forward)
    require_measurable(model, groups[:2], batches, forward)
    for measure in (
        lambda: require_runs(model, model.experts, batches, forward),
        lambda: require_measurable(model, groups, batches, forward),
        lambda: measure_importance(model, groups, batches),
    ):
        with pytest.raises(ValueError, match=r"experts.2 never ran.*exclude_modules"):
            measure()
    once = measure_importance(model, groups[:2], batches)
    again = measure_importance(model, groups[:2], [*batches, routed_batch(2)])
    assert all(map(torch.equal, once, again))
    for expert in model.experts:
        pack_layer([expert], FixedPointQuantizer(bits=8), activation_bits=8)
    calibrate(model, model.experts[:2], batches)
    with pytest.raises(ValueError, match=r"experts.2 never ran"):
        calibrate(model, model.experts, batches)


def make_xmod():
    torch.manual_seed(0)
    config = XmodConfig(**SIZES, **TOKENS, languages=["en", "de"], default_language="en")
    return without_dropout(XmodForSequenceClassification(config))


def language_batch(*languages):
    ids = torch.randint(5, 320, (len(languages), 9))
    return {"input_ids": ids, "lang_ids": torch.tensor(languages)}


def test_xmod_trains_with_noise_on_activations():
    model = make_xmod().train()
    apply_quant_noise(model, QuantNoiseConfig(noise="int8", p=0.5, activation_bits=8))
    for batch in (language_batch(0, 0), language_batch(0, 1), language_batch(1, 1)):
        loss = model(**batch, labels=torch.tensor([0, 1])).loss
        loss.backward()
        assert torch.isfinite(loss)


@pytest.mark.parametrize(
    "config",
    [
        FixedPointConfig(activation_bits=8),
        IPQConfig(block_size=4, n_centroids=8, activation_bits=8, importance="activations"),
    ],
    ids=["int8", "ipq"],
)
def test_xmod_is_calibrated_on_one_language_per_batch(config):
    batches = [language_batch(0, 0), language_batch(1, 1)]
    with pytest.raises(ValueError, match=r"adapter_modules\.de.* never ran"):
        quantize_model(make_xmod(), config, progress=False, calibration_data=batches[:1])
    small = quantize_model(make_xmod(), config, progress=False, calibration_data=batches)
    assert any("adapter_modules" in name for name, _ in packed_layers(small))
    for batch in (*batches, language_batch(1, 0)):
        assert torch.isfinite(small(**batch).logits).all()
