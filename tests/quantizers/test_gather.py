"""Reading centroids as wide elements gives the same bits as a look-up row by row."""

import pytest
import torch
import torch.nn.functional as F

from hf_quantnoise.quantizers import FixedPointQuantizer, ProductQuantizer
from hf_quantnoise.quantizers.gather import gather_rows, is_wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 16])
def test_gather_rows_equals_embedding(dtype, width):
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(40, width, generator=generator).to(dtype)
    table[3, 0], table[4, 0] = float("nan"), -0.0
    for shape in ((30, 6), (2, 5, 7), (1, 3)):
        codes = torch.randint(40, shape, generator=generator, dtype=torch.uint8)
        expected = F.embedding(codes.int(), table)
        found = gather_rows(table, codes)
        assert found.dtype == dtype and found.shape == expected.shape
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_gather_rows_reads_tables_and_codes_at_any_address():
    # A table in a mapped file begins at any multiple of its dtype, here 4 bytes off.
    table = torch.randn(1 + 32 * 4)[1:].view(32, 4)
    codes = torch.randint(32, (9, 40), dtype=torch.uint8)[:, ::2]
    assert is_wide(codes, 16)
    assert torch.equal(gather_rows(table, codes), F.embedding(codes.int(), table))
    columns = torch.randn(4, 32).t()
    assert torch.equal(gather_rows(columns, codes), F.embedding(codes.int(), columns))


def test_codes_out_of_range_raise():
    codes = torch.full((8, 8), 200, dtype=torch.uint8)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        gather_rows(torch.randn(16, 4), codes)


@pytest.mark.parametrize("block_size", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("codebook_bits", [32, 16, 8])
def test_decoding_without_gradients_is_bit_equal(block_size, codebook_bits):
    matrix = torch.randn(48, 96, generator=torch.Generator().manual_seed(block_size))
    quantizer = ProductQuantizer(block_size, 16, codebook_bits)
    state = quantizer.fit(matrix)
    codes = quantizer.encode(matrix, state)
    with torch.no_grad():
        decoded = quantizer.decode(codes, state)
    trained = {key: value.clone().requires_grad_() for key, value in state.items()}
    assert torch.equal(decoded, quantizer.decode(codes, trained))
    rows = quantizer.centroids(state)[codes.long()].flatten(-2)
    assert torch.equal(decoded, rows)


@pytest.mark.parametrize("observer", ["minmax", "channel"])
def test_fixed_point_decoding_without_gradients_is_bit_equal(observer):
    matrix = torch.randn(48, 96)
    quantizer = FixedPointQuantizer(bits=8, observer=observer)
    state = quantizer.fit(matrix)
    codes = quantizer.encode(matrix, state)
    expected = (codes.float() - state["zero_point"]) * state["scale"]
    for values in (codes, codes.float()):
        before = values.clone()
        with torch.no_grad():
            assert torch.equal(quantizer.decode(values, state), expected)
        assert torch.equal(values, before)
