"""Packing of codes: exact round trips and byte counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_quantnoise.quantizers.packing import pack_codes, unpack_codes


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 16), count=st.integers(0, 70), seed=st.integers(0, 999))
def test_round_trip_and_byte_count(bits, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-count * bits // 8)
    unpacked = unpack_codes(packed, bits, count)
    assert unpacked.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert unpacked.tolist() == codes.tolist()


class Unpacking(torch.nn.Module):
    """A model that unpacks codes."""

    def __init__(self, bits, count):
        super().__init__()
        self.bits, self.count = bits, count

    def forward(self, packed):
        return unpack_codes(packed, self.bits, self.count)


@pytest.mark.parametrize("bits", [3, 5, 7, 12])
def test_exported_graph_unpacks_the_same_without_views_as_another_dtype(bits):
    codes = torch.randint(0, 2**bits, (801,))
    packed = pack_codes(codes, bits)
    exported = torch.export.export(Unpacking(bits, 801), (packed,))
    assert exported.module()(packed).tolist() == codes.tolist()
    assert "view.dtype" not in str(exported.graph)
    assert unpack_codes(packed, bits, 801).tolist() == codes.tolist()
    assert torch.equal(packed, pack_codes(codes, bits))  # unchanged


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 12])
def test_layout_is_lowest_bit_first(bits):
    """Compare with Python integers: the stream is one integer in base 2**bits."""
    codes = torch.arange(16) % 2**bits
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    expected = number.to_bytes(-(-16 * bits // 8), "little")
    assert bytes(pack_codes(codes, bits).tolist()) == expected


def test_bytes_are_not_copied():
    codes = torch.arange(6, dtype=torch.uint8)
    assert pack_codes(codes, 8).data_ptr() == codes.data_ptr()
    assert unpack_codes(codes, 8, 6).data_ptr() == codes.data_ptr()


def test_invalid_bits_codes_and_lengths_raise():
    with pytest.raises(ValueError, match=r"bits.*17"):
        pack_codes(torch.zeros(2, dtype=torch.int32), 17)
    with pytest.raises(ValueError, match=r"bits.*17"):
        unpack_codes(torch.zeros(5, dtype=torch.uint8), 17, 2)
    with pytest.raises(ValueError, match=r"codes.*0 to 16.*4 bits"):
        pack_codes(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match="6 bytes, expected 5"):
        unpack_codes(torch.zeros(6, dtype=torch.uint8), 4, 10)
