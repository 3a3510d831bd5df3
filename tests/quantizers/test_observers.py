"""Observers against float64 references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quantnoise import FixedPointConfig, QuantNoiseConfig
from hf_quantnoise.quantizers import FixedPointQuantizer

matrices = st.builds(
    lambda rows, columns, seed, spread, offset: (
        np.random.default_rng(seed).standard_t(2 + spread, (rows, columns)) * 10.0 ** (spread - 3)
        + offset
    ).astype(np.float32),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.integers(0, 6),
    st.sampled_from([0.0, 1.0, -30.0]),
)


def error(matrix: np.ndarray, low, high, bits: int) -> np.ndarray:
    """Return the squared error of each row in float64, by Eq. 2 on a clamped range."""
    matrix = matrix.astype(np.float64)
    low, high = np.broadcast_arrays(np.float64(low), np.float64(high))
    scale = (high - low) / (2**bits - 1)
    scale = np.where(scale > 0, scale, np.where(low == 0, 1.0, np.abs(low)))
    zero = np.round(low / scale)
    return (
        (np.clip(np.round(matrix / scale), zero, zero + 2**bits - 1) * scale - matrix) ** 2
    ).sum(1)


def measured(matrix: np.ndarray, bits: int, observer: str) -> float:
    quantizer = FixedPointQuantizer(bits=bits, observer=observer)
    tensor = torch.from_numpy(matrix)
    result = quantizer.quantize(tensor, quantizer.fit(tensor))
    return float((result.double() - tensor.double()).square().sum())


def tolerance(matrix: np.ndarray) -> float:
    # float32 rounding of w / s where the offset is far larger than the range.
    return 1e-9 + 1e-5 * float((matrix.astype(np.float64) ** 2).mean())


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(1, 8))
def test_no_observer_is_worse_than_minmax(matrix, bits):
    reference = error(matrix, matrix.min(), matrix.max(), bits).sum()
    for observer in ("minmax", "channel", "histogram"):
        assert measured(matrix, bits, observer) <= reference * 1.001 + tolerance(matrix), observer


def test_channel_observer_has_a_range_per_row():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(6, 50)) * 10.0 ** np.arange(-3, 3)[:, None]).astype(np.float32)
    rows = [error(row[None], row.min(), row.max(), 4)[0] for row in matrix]
    assert measured(matrix, 4, "channel") == pytest.approx(sum(rows), rel=1e-4)
    # With a shared range the small rows round to zero.
    small = float((matrix[:4].astype(np.float64) ** 2).sum())
    shared = error(matrix, matrix.min(), matrix.max(), 4)[:4].sum()
    assert shared > 0.9 * small and sum(rows[:4]) < 0.02 * small
    state = FixedPointQuantizer(4, "channel").fit(torch.from_numpy(matrix))
    assert state["scale"].shape == (6, 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_histogram_range_is_near_the_optimum(bits):
    matrix = np.random.default_rng(1).standard_t(3, (64, 64)).astype(np.float32)
    low, high = float(matrix.min()), float(matrix.max())
    ends = np.linspace(low, high, 41)
    best = min(error(matrix, a, b, bits).sum() for i, a in enumerate(ends) for b in ends[i + 1 :])
    assert measured(matrix, bits, "histogram") <= 1.05 * best
    if bits < 8:  # heavy tails: clipping a few weights lowers the error
        assert best < 0.5 * error(matrix, low, high, bits).sum()


def test_histogram_observer_keeps_running_extremes():
    quantizer = FixedPointQuantizer(8, "histogram")
    wide, narrow = torch.linspace(-4, 4, 256)[None], torch.linspace(-1, 1, 256)[None]
    _, running = quantizer.fit_running(wide)
    _, running = quantizer.fit_running(narrow, running)
    assert [float(value) for value in running] == [-4.0, 4.0]
    state, _ = quantizer.fit_running(narrow, running)
    # The running extremes widen the search, not the result.
    assert float(state["scale"]) < 2.2 / 255


@pytest.mark.parametrize("config", [QuantNoiseConfig, FixedPointConfig])
def test_unknown_observer_raises(config):
    with pytest.raises(ValueError, match=r"observer.*'median'"):
        config(observer="median")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("observer", ["minmax", "channel", "histogram"])
def test_scale_of_tiny_float16_rows_is_above_zero(bits, observer):
    """Their range divided by 2^N - 1 is below the smallest float16: 0 / 0 would be NaN."""
    generator = torch.Generator().manual_seed(0)
    smallest = 2.0**-24  # of float16
    tiny = smallest * torch.randint(0, 2**bits // 2, (6, 32), generator=generator)
    tiny[:, 0] = 0
    for others in (torch.randn(2, 32, generator=generator), torch.zeros(0, 32)):
        matrix = torch.cat([tiny, others]).half()
        quantizer = FixedPointQuantizer(bits, observer)
        state = quantizer.fit(matrix)
        assert bool((state["scale"] > 0).all())
        quantized = quantizer.quantize(matrix, state)
        assert torch.isfinite(quantized).all()
        if observer == "channel" or not len(others):
            assert torch.equal(quantized[:6], matrix[:6])
