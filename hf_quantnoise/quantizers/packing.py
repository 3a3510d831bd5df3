"""Packing of N-bit codes into bytes, lowest bit first, without gaps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..compat.torch_func import is_graph

# Codes that are packed or unpacked at a time, a multiple of 8.
PART = 2**17


def code_dtype(bits: int) -> torch.dtype:
    """Return the dtype of unpacked codes: uint8 up to 8 bits, int32 above."""
    return torch.uint8 if bits <= 8 else torch.int32


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"invalid bits: got {bits}, expected 1 to 16")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of any shape into ceil(n * bits / 8) bytes, with 1 to 16 bits per code.

    Returns uint8, one-dimensional; a view of ``codes`` if they are uint8 of 8 bits.
    """
    _check_bits(bits)
    codes = codes.reshape(-1)
    if bits == 8 and codes.dtype == torch.uint8:
        return codes
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(
            f"invalid codes: got {int(codes.min())} to {int(codes.max())}, expected 0 to "
            f"{2**bits - 1} for {bits} bits"
        )
    packed = codes.new_empty(-(-codes.numel() * bits // 8), dtype=torch.uint8)
    shifts = torch.arange(bits, device=codes.device, dtype=torch.int32)
    positions = torch.arange(8, device=codes.device, dtype=torch.uint8)
    for start, end in _parts(codes.numel()):  # the bits of a code take many bytes here
        stream = ((codes[start:end].int()[:, None] >> shifts) & 1).to(torch.uint8).reshape(-1)
        stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
        packed[_bytes(start, end, bits)] = (stream << positions).sum(1, dtype=torch.uint8)
    return packed


def largest_code(packed: Tensor, bits: int, count: int) -> int:
    """Return the largest of ``count`` packed codes, which are unpacked in parts."""
    packed = packed.reshape(-1)
    if bits == 8:
        return int(packed.max())
    largest = [
        unpack_codes(packed[_bytes(start, end, bits)], bits, end - start).max()
        for start, end in _parts(count)
    ]
    return int(torch.stack(largest).max())


def has_code_from(packed: Tensor, bits: int, count: int, limit: int) -> bool:
    """Return whether one of ``count`` packed codes is ``limit`` or more.

    Below 8 bits, eight codes in a 64-bit word are compared at a time, which is five times faster
    than to unpack them: adding ``2**bits - limit`` to a code sets the next bit if the code is
    ``limit`` or more. Every second code is masked, as that bit is its lowest one.
    """
    if bits >= 8:
        return largest_code(packed, bits, count) >= limit
    packed = packed.reshape(-1)
    mask, addend, carry = (
        sum(value << 2 * bits * field for field in range(4))
        for value in (2**bits - 1, 2**bits - limit, 2**bits)
    )
    whole = count // 8 * 8
    for start, end in _parts(whole):
        words = _words(packed[_bytes(start, end, bits)], bits)
        even, odd = ((words >> shift).bitwise_and_(mask).add_(addend) for shift in (0, bits))
        if bool(even.bitwise_or_(odd).bitwise_and_(carry).any()):
            return True
    rest = packed[_bytes(whole, count, bits)]
    return whole < count and int(unpack_codes(rest, bits, count - whole).max()) >= limit


def _parts(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, PART):
        yield start, min(start + PART, count)


def _bytes(start: int, end: int, bits: int) -> slice:
    """Return the bytes of the codes from ``start``, a multiple of 8, to ``end``."""
    return slice(start * bits // 8, -(-end * bits // 8))


def _words(packed: Tensor, bits: int) -> Tensor:
    """Return one int64 for eight codes, which take less than 8 bits each."""
    if missing := -packed.numel() % bits:
        packed = torch.nn.functional.pad(packed, (0, missing))
    octets = torch.nn.functional.pad(packed.view(-1, bits), (0, 8 - bits))
    return octets.view(torch.int64).view(-1)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack codes to shape (count,) and :func:`code_dtype`; the inverse of :func:`pack_codes`."""
    _check_bits(bits)
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(
            f"invalid packed codes: got {packed.numel()} bytes, expected {-(-count * bits // 8)} "
            f"for {count} codes of {bits} bits"
        )
    if bits == 8:
        return packed
    if bits in (1, 2, 4):  # no code crosses a byte
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        return ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:count]
    # A graph may be exported to a format that has no views as another dtype.
    if bits < 8 and not is_graph():
        return _spread(_words(packed, bits), bits).view(torch.uint8)[:count]
    return _from_bytes(packed, bits, count)


def _spread(words: Tensor, bits: int) -> Tensor:
    """Move eight adjacent codes of each word to a byte each, in place: four, two, one at a time."""
    for codes in (4, 2, 1):
        mask = sum((2 ** (codes * bits) - 1) << 16 * codes * k for k in range(4 // codes))
        upper = (words >> codes * bits).bitwise_and_(mask).bitwise_left_shift_(8 * codes)
        words.bitwise_and_(mask).bitwise_or_(upper)
    return words


def _from_bytes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack codes of any number of bits with arithmetic of bytes only."""
    # Eight codes fill `bits` bytes; each is within three adjacent bytes (two zeros pad the last).
    groups = -(-count // 8)
    octets = torch.nn.functional.pad(packed, (0, groups * bits - packed.numel())).view(-1, bits)
    octets = torch.nn.functional.pad(octets.int(), (0, 2))
    codes = []
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        word = octets[:, byte] | octets[:, byte + 1] << 8 | octets[:, byte + 2] << 16
        codes.append(((word >> shift) & (2**bits - 1)).to(code_dtype(bits)))
    return torch.stack(codes, 1).view(-1)[:count]
