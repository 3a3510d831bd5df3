"""Packing of N-bit codes into bytes, lowest bit first, without gaps."""

from __future__ import annotations

import torch
from torch import Tensor


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
    shifts = torch.arange(bits, device=codes.device, dtype=torch.int32)
    stream = ((codes.int()[:, None] >> shifts) & 1).to(torch.uint8).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    positions = torch.arange(8, device=codes.device, dtype=torch.uint8)
    return (stream << positions).sum(1, dtype=torch.uint8)


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
