"""Noise and quantizers do not depend on torch's default device."""

from contextlib import nullcontext

import pytest
import torch
from support.tiny import make_model

from hf_quantnoise import QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.noise import find_state
from hf_quantnoise.noise.activations import ActivationNoise
from hf_quantnoise.quantizers import (
    AdditiveQuantizer,
    FixedPointQuantizer,
    ProductQuantizer,
    RowGroupQuantizer,
    kmeans,
)
from hf_quantnoise.quantizers.refit import fit_or_follow

QUANTIZERS = [
    ProductQuantizer(block_size=4, n_centroids=60),
    ProductQuantizer(4, 16, codebook_bits=8, row_scale=True),
    AdditiveQuantizer(block_size=8, n_centroids=16),
    RowGroupQuantizer(group_rows=(32, 64), block_sizes=(4, 8), n_centroids=16),
    *(FixedPointQuantizer(4, observer) for observer in ("minmax", "channel", "histogram")),
]


def assert_same_on_any_default_device(compute):
    """Compare results, a list of tensors, with and without another default device."""
    results = []
    for context in (nullcontext(), torch.device("meta")):
        with context:
            results.append(compute())
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_quantizers_do_not_depend_on_the_default_device(quantizer):
    matrix = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    drift = 0.1 * matrix.roll(1, 0)

    def compute():
        state = fit_or_follow(quantizer, matrix, {}, seed=0)
        if quantizer.has_codebook:
            state = fit_or_follow(quantizer, matrix + drift, state, seed=0)
        codes = state.pop("codes")
        packed = quantizer.pack(codes, state)
        shape = quantizer.indices_shape(*matrix.shape)
        unpacked = quantizer.unpack(packed.view(shape), state, matrix.shape)
        return [quantizer.decode(codes, state), unpacked, packed, *state.values()]

    assert_same_on_any_default_device(compute)


@pytest.mark.parametrize("sampling", [{}, {"SAMPLE_POINTS": 500}, {"MAX_PERMUTED": 0}], ids=str)
def test_kmeans_does_not_depend_on_the_default_device(sampling, monkeypatch):
    for name, value in {"SEEDING_POINTS": 100, "SEEDING_POINTS_EACH": 1, **sampling}.items():
        monkeypatch.setattr(kmeans, name, value)
    points = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    points[:900] = points[0]  # so that there are fewer distinct points than centroids
    assert_same_on_any_default_device(lambda: kmeans.kmeans(points[:1000], 8))
    assert_same_on_any_default_device(lambda: kmeans.kmeans(points[800:], 120))


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"noise": "pq", "learn_codebooks": True, "layerdrop": 0.5},
        {"noise": ["pq", "int8"], "block_selection": "cluster"},
        {"noise": ["mean", "int4"], "activation_bits": 8, "activation_calibration": 1},
    ],
    ids=str,
)
def test_noise_does_not_depend_on_the_default_device(fields, p):
    """A model with a tied head; the masks of both are sampled from one seed."""
    ids = torch.arange(12).view(2, 6)

    def compute():
        with torch.device("cpu"):
            model = make_model("gpt2").train()
        apply_quant_noise(model, QuantNoiseConfig(p=p, n_centroids=16, block_size=4, **fields))
        torch.manual_seed(0)
        outputs = [model(ids).logits for _ in range(2)]
        outputs[-1].square().mean().backward()
        noise = find_state(model)
        noise.refresh_codebooks()
        noise.refresh_scales()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [*outputs, *gradients, *noise.state_dict().values()]

    assert_same_on_any_default_device(compute)


def test_state_of_new_activation_noise_is_on_the_cpu():
    assert_same_on_any_default_device(lambda: [*ActivationNoise(8, 1).state.values()])
