"""Triton code of the kernel ``triton``. It is imported when the kernel is used for the first time.

A program computes a tile of outputs. It reads codes and the centroids that they name, and so has a
tile of the weight in registers: a decoded weight is never in memory. The codebook (at most 256
centroids, 2 to 16 KB) stays in the L1 cache, which is the memory of the chip that is also called
shared memory. Codes are read packed, with 1 to 8 bits each.

Sums are float32. Values of the weight and the inputs are rounded to the dtype of the outputs before
they are multiplied, as in a product with a decoded weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to this many inputs, a program computes outputs of one input. With more, it computes a tile of
# 16 inputs or more, which is the smallest that tensor cores take.
MAX_FEW = 4
FEW_ROWS, FEW_COLUMNS = 8, 512


@triton.jit
def _decoded(codes, codebook, row, block, n_rows, n_blocks, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Return a tile of the weight, (rows, blocks, SIZE); zeros outside of the matrix."""
    inside = (row < n_rows)[:, None] & (block < n_blocks)[None, :]
    index = row.to(tl.int64)[:, None] * n_blocks + block[None, :]
    if BITS == 8:
        code = tl.load(codes + index, mask=inside, other=0).to(tl.int32)
    else:
        first = index * BITS // 8
        shift = (index * BITS % 8).to(tl.int32)
        code = tl.load(codes + first, mask=inside, other=0).to(tl.int32)
        if 8 % BITS != 0:
            continues = inside & (shift + BITS > 8)
            code |= tl.load(codes + first + 1, mask=continues, other=0).to(tl.int32) << 8
        code = (code >> shift) & ((1 << BITS) - 1)
    element = code[:, :, None] * SIZE + tl.arange(0, SIZE)[None, None, :]
    return tl.load(codebook + element, mask=inside[:, :, None], other=0.0)


@triton.jit
def _finished(sums, row, scales, bias, n_rows):
    """Return sums (..., rows) times the scale of each row, plus the bias, if there are any."""
    if scales is not None:
        sums *= tl.load(scales + row, mask=row < n_rows, other=0.0).to(tl.float32)
    if bias is not None:
        sums += tl.load(bias + row, mask=row < n_rows, other=0.0).to(tl.float32)
    return sums


@triton.jit
def few_inputs(
    inputs, codes, codebook, scales, bias, outputs, n_rows, n_blocks, stride,
    BITS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute outputs of ROWS rows for one input."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1).to(tl.int64)
    dtype = outputs.dtype.element_ty
    sums = tl.zeros((ROWS, COLUMNS // SIZE), tl.float32)
    for start in range(0, n_blocks, COLUMNS // SIZE):
        block = start + tl.arange(0, COLUMNS // SIZE)
        weight = _decoded(codes, codebook, row, block, n_rows, n_blocks, BITS, SIZE)
        column = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        within = (block < n_blocks)[:, None]
        values = tl.load(inputs + which * stride + column, mask=within, other=0.0)
        values = values.to(dtype).to(tl.float32)
        sums += tl.sum(weight.to(dtype).to(tl.float32) * values[None, :, :], 2)
    result = _finished(tl.sum(sums, 1), row, scales, bias, n_rows)
    tl.store(outputs + which * n_rows + row, result.to(dtype), mask=row < n_rows)


@triton.jit
def many_inputs(
    inputs, codes, codebook, scales, bias, outputs, n_inputs, n_rows, n_blocks, stride,
    BITS: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr, INPUTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute outputs of ROWS rows for INPUTS inputs."""
    which = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dtype = outputs.dtype.element_ty
    sums = tl.zeros((INPUTS, ROWS), tl.float32)
    for start in range(0, n_blocks * SIZE, COLUMNS):
        block = start // SIZE + tl.arange(0, COLUMNS // SIZE)
        weight = _decoded(codes, codebook, row, block, n_rows, n_blocks, BITS, SIZE)
        weight = tl.reshape(weight, (ROWS, COLUMNS)).to(dtype)
        column = start + tl.arange(0, COLUMNS)
        within = (which < n_inputs)[:, None] & (column < n_blocks * SIZE)[None, :]
        place = which.to(tl.int64)[:, None] * stride + column[None, :]
        values = tl.load(inputs + place, mask=within, other=0.0).to(dtype)
        sums = tl.dot(values, tl.trans(weight), sums, input_precision=PRECISION)
    result = _finished(sums, row[None, :], scales, bias, n_rows)
    place = which.to(tl.int64)[:, None] * n_rows + row[None, :]
    within = (which < n_inputs)[:, None] & (row < n_rows)[None, :]
    tl.store(outputs + place, result.to(dtype), mask=within)


def tile_of(n_inputs: int, dtype: torch.dtype) -> dict[str, int]:
    """Return options of :func:`many_inputs`: the size of a tile, and what the compiler may use."""
    fits = max(16, triton.next_power_of_2(n_inputs))
    # Without tensor cores, float32 needs many more registers for a tile. With 64 inputs, Triton 3.7
    # would use TF32 on GPUs of capability 10.0, also for "ieee". With loads that are issued ahead
    # (stages), registers would spill, and the compiler of Triton 3.2 would abort.
    inputs, columns, stages = (32, 32, 1) if dtype == torch.float32 else (128, 64, 3)
    inputs = min(fits, inputs)
    warps = 8 if inputs > 16 else 4
    return {"INPUTS": inputs, "ROWS": 64, "COLUMNS": columns, "num_warps": warps,
            "num_stages": stages}  # fmt: skip


def write_products(
    inputs: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    outputs: Tensor,
    bits: int,
    precision: str,
) -> None:
    """Write the products of inputs (n, columns) to outputs (n, rows).

    Args:
        inputs: any float dtype; values of an input are adjacent.
        codes: packed codes of ``bits`` bits, row by row without gaps.
        codebook: (K, block size), contiguous.
        scales: a scale for each row, or None.
        bias: (rows,), or None.
        outputs: contiguous; their dtype is that of the products.
        bits: 1 to 8.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    (n_inputs, n_rows), size = outputs.shape, codebook.shape[1]
    n_blocks, stride = inputs.shape[1] // size, inputs.stride(0)
    tensors = (inputs, codes, codebook, scales, bias, outputs)
    with torch.cuda.device_of(outputs):
        if n_inputs <= MAX_FEW:
            few_inputs[triton.cdiv(n_rows, FEW_ROWS), n_inputs](
                *tensors, n_rows, n_blocks, stride,
                BITS=bits, SIZE=size, ROWS=FEW_ROWS, COLUMNS=FEW_COLUMNS,
            )  # fmt: skip
            return
        tile = tile_of(n_inputs, outputs.dtype)
        grid = triton.cdiv(n_inputs, tile["INPUTS"]), triton.cdiv(n_rows, tile["ROWS"])
        many_inputs[grid](
            *tensors, n_inputs, n_rows, n_blocks, stride,
            BITS=bits, SIZE=size, PRECISION=precision, **tile,
        )  # fmt: skip
