"""Fixed-point and product quantizers against the paper's equations in float64."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quantnoise.quantizers import FixedPointQuantizer, ProductQuantizer, quantizer_from_dict

QUANTIZERS = [
    ProductQuantizer(block_size=4, n_centroids=16),
    ProductQuantizer(block_size=8, n_centroids=300),
    ProductQuantizer(block_size=2, n_centroids=5, codebook_bits=16),
    ProductQuantizer(block_size=4, n_centroids=16, codebook_bits=8),
    *(ProductQuantizer(4, 16, bits, row_scale=True) for bits in (32, 16, 8)),
    *(FixedPointQuantizer(bits=bits) for bits in range(1, 9)),
    *(
        FixedPointQuantizer(bits, observer)
        for bits in (2, 8)
        for observer in ("channel", "histogram")
    ),
]


def matrix_of(rows=96, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
class TestEveryQuantizer:
    def test_quantize_is_idempotent(self, quantizer):
        matrix = matrix_of()
        state = quantizer.fit(matrix)
        once = quantizer.quantize(matrix, state)
        assert torch.equal(quantizer.quantize(once, state), once)

    def test_codes_and_state_match_the_spec(self, quantizer):
        matrix = matrix_of()
        state = quantizer.fit(matrix)
        codes = quantizer.encode(matrix, state)
        assert codes.shape == (96, 32 // quantizer.block_size)
        assert int(codes.min()) >= 0 and int(codes.max()) < 2**quantizer.code_bits
        spec = quantizer.state_spec(96, 32)
        assert {key: tuple(t.shape) for key, t in state.items()} == {
            k: s for k, (s, _) in spec.items()
        }

    def test_json_round_trip(self, quantizer):
        assert quantizer_from_dict(json.loads(json.dumps(quantizer.to_dict()))) == quantizer

    def test_fit_is_deterministic(self, quantizer):
        matrix = matrix_of()
        first, second = quantizer.fit(matrix, seed=3), quantizer.fit(matrix, seed=3)
        assert all(torch.equal(first[key], second[key]) for key in first)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, quantizer, dtype):
        matrix = matrix_of().to(dtype)
        result = quantizer.quantize(matrix, quantizer.fit(matrix))
        assert result.dtype == dtype and torch.isfinite(result).all()

    def test_nan_raises(self, quantizer):
        matrix = matrix_of()
        matrix[0, 0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            quantizer.fit(matrix)

    def test_matrix_without_rows_has_no_codes(self, quantizer):
        """A noisy table with ``max_norm`` may be called without words."""
        state = quantizer.state_of_rows(quantizer.fit(matrix_of()), slice(0, 0))
        codes = quantizer.encode(matrix_of()[:0], state)
        assert codes.shape == (0, 32 // quantizer.block_size)
        assert quantizer.decode(codes, state).shape == (0, 32)


# ---- Eq. 2 ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    offset=st.sampled_from([0.0, 0.5, -2.0, 30.0]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 999),
)
def test_fixed_point_is_eq_2(bits, offset, scale, seed):
    matrix = matrix_of(8, 12, seed) * scale + offset * scale
    quantizer = FixedPointQuantizer(bits=bits)
    state = quantizer.fit(matrix)
    result = quantizer.quantize(matrix, state).double()
    exact = matrix.double()
    s = (exact.max() - exact.min()) / (2**bits - 1)
    assert float(state["scale"]) == pytest.approx(float(s), rel=1e-5)
    # Half a step, and half a step more if rounding z moved the ends of the range.
    assert (result - exact).abs().max() <= s * (1 + 1e-4) + 1e-6 * exact.abs().max()
    assert result.unique().numel() <= 2**bits
    z = torch.round(exact.min() / s)
    reference = (torch.round(exact / s).clamp(z, z + 2**bits - 1)) * s
    near_half = ((exact / s).frac().abs() - 0.5).abs() < 1e-3  # float32 may round these differently
    torch.testing.assert_close(result[~near_half], reference[~near_half], rtol=1e-3, atol=1e-5)


def test_int4_uses_sixteen_levels():
    matrix = matrix_of(200, 32)
    quantizer = FixedPointQuantizer(bits=4)
    state = quantizer.fit(matrix)
    codes = quantizer.encode(matrix, state)
    assert codes.unique().tolist() == list(range(16))
    span = matrix.max() - matrix.min()
    assert float(state["scale"]) == pytest.approx(float(span) / 15)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value", [0.0, 0.37, -2.5])
def test_constant_matrices_are_reproduced(bits, value):
    matrix = torch.full((4, 8), value)
    quantizer = FixedPointQuantizer(bits=bits)
    assert torch.equal(quantizer.quantize(matrix, quantizer.fit(matrix)), matrix)


def test_more_bits_lower_the_error():
    matrix = matrix_of()
    errors = []
    for bits in range(1, 9):
        quantizer = FixedPointQuantizer(bits=bits)
        errors.append(float((quantizer.quantize(matrix, quantizer.fit(matrix)) - matrix).norm()))
    assert errors == sorted(errors, reverse=True)


def test_values_outside_the_range_are_clamped():
    matrix = matrix_of()
    quantizer = FixedPointQuantizer(bits=8)
    state = quantizer.fit(matrix)
    result = quantizer.quantize(matrix * 10, state)
    step = float(state["scale"])
    assert float(result.max()) <= float(matrix.max()) + step
    assert float(result.min()) >= float(matrix.min()) - step


# ---- section 3.2 ---------------------------------------------------------------------------------


def test_quantize_uses_the_nearest_centroid():
    matrix = matrix_of()
    quantizer = ProductQuantizer(block_size=4, n_centroids=16)
    state = quantizer.fit(matrix)
    blocks = matrix.reshape(-1, 4).double()
    codebook = state["codebook"].double()
    distances = torch.cdist(blocks, codebook).square()
    errors = (quantizer.quantize(matrix, state).reshape(-1, 4).double() - blocks).square().sum(1)
    assert (errors - distances.min(1).values).max() <= 2e-4 * blocks.square().sum(1).max()


def test_decode_gradient_sums_over_blocks():
    quantizer = ProductQuantizer(block_size=4, n_centroids=16)
    state = quantizer.fit(matrix_of())
    codes = quantizer.encode(matrix_of(), state)
    codebook = state["codebook"].requires_grad_()
    upstream = matrix_of(seed=5)
    (quantizer.decode(codes, state) * upstream).sum().backward()
    expected = torch.zeros(16, 4, dtype=torch.float64)
    expected.index_add_(0, codes.reshape(-1).long(), upstream.reshape(-1, 4).double())
    torch.testing.assert_close(codebook.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 8])
def test_16_and_8_bit_centroids_are_used_as_stored(bits):
    quantizer = ProductQuantizer(block_size=4, n_centroids=16, codebook_bits=bits)
    huge = matrix_of() * 1e6  # beyond float16: clamped, not infinite
    assert torch.isfinite(quantizer.quantize(huge, quantizer.fit(huge))).all()
    state = quantizer.fit(matrix_of())
    codes = quantizer.encode(matrix_of(), state)
    used = quantizer.decode(codes, state)
    written = quantizer.to_storage(state)
    spec = quantizer.state_spec(*matrix_of().shape)
    assert {key: value.dtype for key, value in written.items()} == {
        k: d for k, (_, d) in spec.items()
    }
    read = quantizer.from_storage(written)
    assert torch.equal(quantizer.decode(codes, read), used)
    # Saving again gives the same file.
    rewritten = quantizer.to_storage(read)
    assert all(torch.equal(rewritten[key], written[key]) for key in written)
    state["codebook"].requires_grad_()
    quantizer.decode(codes, state).sum().backward()
    assert torch.equal(
        state["codebook"].grad[:, 0], torch.bincount(codes.flatten().int(), minlength=16).float()
    )


def test_8_bit_centroids_are_eq_2_on_the_codebook():
    quantizer = ProductQuantizer(block_size=4, n_centroids=16, codebook_bits=8)
    state = quantizer.fit(matrix_of())
    codebook = state["codebook"].double()
    scale = (codebook.max() - codebook.min()) / 255
    zero = torch.round(codebook.min() / scale)
    expected = (torch.round(codebook / scale - zero) + zero) * scale
    torch.testing.assert_close(quantizer.centroids(state).double(), expected, rtol=1e-5, atol=1e-6)
    assert quantizer.packed_bytes(96, 32) == 16 * 4 + 8 + 96 * 8 // 2


def test_scale_of_8_bit_centroids_is_updated_in_training_only():
    quantizer = ProductQuantizer(block_size=4, n_centroids=16, codebook_bits=8)
    state = quantizer.fit(matrix_of())
    before = float(state["codebook_scale"])
    state["codebook"] = (state["codebook"] * 2).requires_grad_()
    with torch.no_grad():
        quantizer.centroids(state)
    assert float(state["codebook_scale"]) == before
    quantizer.centroids(state)
    assert float(state["codebook_scale"]) == pytest.approx(2 * before)


def test_packed_bytes_match_section_3_3():
    assert ProductQuantizer(8, 256).packed_bytes(768, 3072) == (32 * 256 * 8 + 8 * 768 * 384) // 8
    assert ProductQuantizer(4, 16, 16).packed_bytes(10, 12) == (16 * 16 * 4 + 4 * 30) // 8
    assert ProductQuantizer(4, 31).code_bits == 5
    assert FixedPointQuantizer(4).packed_bytes(3, 5) == 8 + 8


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((8, 30), "block size 4 does not divide its 30 columns"), ((2, 32), "only 16 blocks for 16")],
)
def test_check_returns_the_reason(shape, reason):
    assert reason in ProductQuantizer(block_size=4, n_centroids=16).check(*shape)


def test_unknown_scheme_and_field_raise():
    with pytest.raises(ValueError, match="invalid scheme='lattice'"):
        quantizer_from_dict({"scheme": "lattice"})
    with pytest.raises(ValueError, match="rotation"):
        quantizer_from_dict({"scheme": "pq", "rotation": True})


@pytest.mark.parametrize("observer", ["minmax", "channel", "histogram"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_fixed_point_in_chunks_of_rows(bits, observer, monkeypatch):
    """Codes, the rounded matrix and the fit do not depend on the size of the chunks."""
    torch.manual_seed(0)
    matrix = torch.randn(37, 24) * torch.rand(37, 1)
    quantizer = FixedPointQuantizer(bits, observer)
    state = quantizer.fit(matrix)
    codes = quantizer.encode(matrix, state)
    monkeypatch.setattr("hf_quantnoise.quantizers.observers.CHUNK_ELEMENTS", 4096)
    monkeypatch.setattr("hf_quantnoise.quantizers.fixed_point.CHUNK_ELEMENTS", 50)
    assert torch.equal(quantizer.encode(matrix, state), codes)
    assert torch.equal(quantizer.quantize(matrix, state), quantizer.decode(codes, state))
    for key, value in quantizer.fit(matrix).items():
        torch.testing.assert_close(value, state[key], rtol=1e-6, atol=0)
