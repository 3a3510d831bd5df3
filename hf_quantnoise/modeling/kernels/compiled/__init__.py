"""Multiply with centroids as codes are read, in machine code of this processor.

It needs llvmlite (``pip install 'hf-quantnoise[cpu]'``), which compiles the functions of
``methods.py`` when they are first called. Sums are in float32.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....compat.openmp import usable_threads
from ....quantizers import AdditiveQuantizer, FixedPointQuantizer, ProductQuantizer
from .. import int8
from ..case import Case, check_inputs

if TYPE_CHECKING:
    from .program import Program

# Not in torch's default dtype, or on its default device, which may be others during the import.
_ZERO, _ONE = (torch.full((1,), value, dtype=torch.float32, device="cpu") for value in (0.0, 1.0))

logger = logging.getLogger(__name__)

BLOCK_SIZES = (2, 4, 8, 16)
INTEGERS = 16  # integers that are read at a time
MAX_CODEBOOK_BYTES = 2**20
# For up to as many inputs a vector is a block; for more it is a value of each input.
FEW = 4
# For more inputs the product of torch is faster: for integers and models in 16 bits; in float32, if
# no table saves work.
MAX_INPUTS, MAX_INPUTS_WITHOUT_TABLE = 64, 512
# More rounded inputs than this are faster in 8-bit integers, if weights are integers or centroids.
MOST_INTEGERS, MOST_ROUNDED = 16, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Bytes of a table, a part of an L2 cache.
TABLE_BYTES = 2**17
# Additions of vectors that a selected product costs, with its code.
COST_OF_TERM = 2.5
# Rows of a slice, whose outputs are in the scratch.
SLICE_ROWS = 8192
# Codes that a thread reads, for one vector of inputs: 30 microseconds.
CODES_PER_THREAD = 2**17


@cache
def is_available() -> bool:
    """Return whether llvmlite can be imported; logs why not if it is installed and broken."""
    try:
        from . import machine_code  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "llvmlite":
            return False
        reason: Exception = error
    except Exception as error:  # of any type: a library that does not load, another version
        reason = error
    else:
        return True
    logger.warning(
        "the kernel 'compiled' is not used, as llvmlite cannot be imported (%s: %s); reinstall it: "
        "pip install 'hf-quantnoise[cpu]'",
        *(type(reason).__name__, reason),
    )
    return False


def supports(layer: Any, case: Case) -> bool:
    """Return whether the layer's blocks fill registers, and inputs are a few or a table pays."""
    quantizer = layer.quantizer
    if case.device != "cpu" or case.is_autocast or not case.has_memory:
        return False
    if case.dtype not in DTYPES or not case.n_inputs:
        return False
    if layer.weight_indices.numel() < 4:  # bytes that are read at a time
        return False
    is_integer = isinstance(quantizer, FixedPointQuantizer)
    most = MOST_INTEGERS if is_integer else MOST_ROUNDED
    if case.n_inputs > most and int8.supports(layer, case) and int8.is_available():
        return False
    if case.n_inputs > MAX_INPUTS and (is_integer or case.dtype != torch.float32):
        return False
    if is_integer:
        return quantizer.bits == 8 and layer.columns % INTEGERS == 0
    if type(quantizer) not in (ProductQuantizer, AdditiveQuantizer):
        return False
    entries, size = quantizer.codes_per_block * 2**quantizer.code_bits, quantizer.block_size
    if size not in BLOCK_SIZES or 4 * entries * size > MAX_CODEBOOK_BYTES:
        return False
    few = case.n_inputs <= MAX_INPUTS_WITHOUT_TABLE
    return few or _saves_with_table(layer.rows, size, quantizer.code_bits)


def run(layer: Any, inputs: Tensor, case: Case) -> Tensor:
    """Return the outputs, computed in float32."""
    from .machine_code import call

    quantizer = layer.quantizer
    codes, bias = layer.weight_indices.contiguous(), layer.bias
    codebook, scale, shift = _weight(layer)
    check_inputs(layer, inputs, codes, codebook, scale, bias, shift)
    given = inputs.reshape(-1, layer.columns).float().contiguous()
    plan = _plan(
        *(layer.rows, layer.columns, _block_size(quantizer), quantizer.code_bits),
        *(_n_codebooks(quantizer), case.n_inputs, usable_threads()),
    )
    outputs = given.new_empty(case.n_inputs, layer.rows)
    scratch = given.new_empty(plan.scratch)
    bias = _ZERO if bias is None else _vector(bias)
    tensors = (codes, codebook, given, outputs, scale, bias, shift, scratch)
    call(
        plan.program,
        plan.n_threads,
        *(tensor.data_ptr() for tensor in tensors),
        *(int(tensor.numel() > 1) for tensor in (scale, bias, shift)),
        codes.numel(),
        *plan.sizes,
    )
    return outputs.to(inputs.dtype).view(*inputs.shape[:-1], layer.rows)


def _block_size(quantizer: Any) -> int:
    return INTEGERS if isinstance(quantizer, FixedPointQuantizer) else quantizer.block_size


def _n_codebooks(quantizer: Any) -> int:
    return 0 if isinstance(quantizer, FixedPointQuantizer) else quantizer.codes_per_block


def _vector(values: Tensor) -> Tensor:
    return values.float().contiguous()


def _weight(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return codebooks, scale and shift of a layer in float32."""
    quantizer, state = layer.quantizer, layer.state
    if isinstance(quantizer, FixedPointQuantizer):
        return _ZERO, _vector(state["scale"]), -_vector(state["zero_point"])
    books = quantizer.centroids(state).float()
    if missing := 2**quantizer.code_bits - quantizer.n_centroids:  # wrong codes read NaN
        books = books.view(-1, quantizer.n_centroids, quantizer.block_size)
        books = F.pad(books, (0, 0, 0, missing), value=float("nan"))
    scale = _vector(quantizer.scales(state)) if quantizer.row_scale else _ONE
    return books.contiguous(), scale, _ZERO


@dataclass(frozen=True)
class Plan:
    """A program, the number of threads, and sizes: the last arguments of the program."""

    program: Program
    n_threads: int
    scratch: int
    sizes: tuple[int, ...]


@lru_cache(maxsize=4096)
def _plan(
    rows: int, columns: int, size: int, bits: int, n_books: int, n_inputs: int, n_threads: int
) -> Plan:
    """Return how to compute the outputs of some inputs with codes of ``bits`` bits."""
    blocks = columns // size
    row_bits = blocks * n_books * bits
    aligned = row_bits % 8 == 0 and row_bits >= 32
    program = _program(rows, size, bits, n_books, n_inputs, aligned)
    groups = -(-n_inputs // program.width)
    entries, width = max(1, n_books) * 2**bits, program.width
    n_threads = max(1, min(n_threads, rows * blocks * max(1, n_books) * groups // CODES_PER_THREAD))
    n_slices = -(-rows // SLICE_ROWS) * (n_threads if groups % n_threads else 1)
    chunk = max(1, TABLE_BYTES // (4 * entries * width))
    per_input = 0
    if program.method != "dot":
        per_input = columns + -(-rows // n_slices)
        per_input += chunk * entries if program.method == "table" else 0
    scratch = per_input * width
    n_units = groups * n_slices
    sizes = (rows, blocks, 2**bits, n_inputs, n_slices, n_units, chunk, scratch)
    return Plan(program, n_threads, n_threads * scratch, sizes)


def _program(
    rows: int, size: int, bits: int, n_books: int, n_inputs: int, aligned: bool
) -> Program:
    """Return the program of lowest cost."""
    from .llvm import has_wide_registers
    from .program import Program

    if n_inputs <= FEW or not n_books:
        method, width = "dot", min(FEW, 2 ** (n_inputs - 1).bit_length())
    else:
        method = "table" if _saves_with_table(rows, size, bits) else "lanes"
        width = 16 if n_inputs > 8 and has_wide_registers() else 8
    return Program(method, size, bits, n_books, width, aligned)


def _saves_with_table(rows: int, size: int, bits: int) -> bool:
    """Return whether a block costs less than ``size`` additions of vectors, part of the table too.

    The table has an entry for each code, and is filled once for all rows.
    """
    return COST_OF_TERM + size * 2**bits / rows < size
