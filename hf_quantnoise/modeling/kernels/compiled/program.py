"""The arguments of a compiled function, and how it reads packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from .llvm import F32, I8, I32, I64, POINTER, Builder, vector

# Arguments of a call, 64 bits each. Sizes count elements; steps are 0 for a value of all rows.
POINTERS = ("codes", "codebook", "inputs", "outputs", "scale", "bias", "shift", "scratch")
SIZES = (
    *("scale_step", "bias_step", "shift_step", "n_bytes", "rows", "blocks", "n_centroids"),
    *("n_inputs", "n_slices", "n_units", "chunk", "scratch_step"),
)
ARGUMENTS = (*POINTERS, *SIZES)


@dataclass(frozen=True)
class Program:
    """Properties that a function is specialized for.

    Attributes:
        method: ``"dot"``, ``"lanes"`` or ``"table"``.
        block_size: values of a centroid. Integers are read in blocks of 16.
        code_bits: bits of a code.
        n_codebooks: codes of a block, whose centroids are added; 0 for weights of 8-bit integers.
        width: inputs at a time.
        aligned: whether each row of codes is a number of bytes, four or more.
    """

    method: str
    block_size: int
    code_bits: int
    n_codebooks: int
    width: int
    aligned: bool

    @property
    def rows(self) -> int:
        """Rows at a time, so that their sums fit in registers."""
        return 4 if self.method == "dot" and self.width > 2 else 8


class Writer(Builder):
    """Writes the function of a program."""

    def __init__(self, function: ir.Function, program: Program) -> None:
        super().__init__(function)
        self.program = program
        self.given: dict[str, Any] = {}
        for index, name in enumerate(ARGUMENTS):
            value = self.read(function.args[0], I64(index), I64)
            self.given[name] = self.inttoptr(value, POINTER) if name in POINTERS else value

    def code(self, row: Any, block: Any, book: int) -> Any:
        """Return a code. It is within four bytes, of which none is read past the end."""
        program, given = self.program, self.given
        n_books, bits = program.n_codebooks, program.code_bits
        first = self.product(row, given["blocks"], n_books)
        index = self.sum(self.product(block, n_books), I64(book))
        if bits in (8, 16):
            of = ir.IntType(bits)
            pointer = self.at(given["codes"], self.sum(first, index), of)
            return self.zext(self.load(pointer, typ=of, align=1), I64)
        codes, n_bytes = given["codes"], given["n_bytes"]
        if program.aligned:  # positions within a row are then the same in all rows
            n_bytes = self.lshr(self.product(given["blocks"], n_books * bits), I64(3))
            codes = self.at(codes, self.product(row, n_bytes), I8)
        else:
            index = self.sum(first, index)
        bit = self.product(index, bits)
        byte = self.smaller(self.lshr(bit, I64(3)), self.sub(n_bytes, I64(4)))
        word = self.zext(self.read(codes, byte, I32, I8), I64)
        return self.and_(self.lshr(word, self.sub(bit, self.shl(byte, I64(3)))), I64(2**bits - 1))

    def centroid(self, row: Any, block: Any, book: int) -> Any:
        """Return the index of a centroid in the codebooks."""
        return self.sum(self.code(row, block, book), self.product(self.given["n_centroids"], book))

    def weights(self, row: Any, block: Any) -> Any:
        """Return the ``block_size`` weights of a block, but for the scale of the row."""
        program, given = self.program, self.given
        of = vector(program.block_size)
        if not program.n_codebooks:
            first = self.product(self.sum(self.product(row, given["blocks"]), block), of.count)
            codes = self.read(given["codes"], first, ir.VectorType(I8, of.count), I8)
            values = self.uitofp(self.zext(codes, ir.VectorType(I32, of.count)), of)
            shift = self.read(given["shift"], self.product(row, given["shift_step"]), F32)
            return self.fadd(values, self.splat(shift, of.count))
        values = None
        for book in range(program.n_codebooks):
            index = self.product(self.centroid(row, block, book), of.count)
            term = self.read(given["codebook"], index, of, F32)
            values = term if values is None else self.fadd(values, term)
        return values


@dataclass
class Unit:
    """A slice of rows, from ``low`` to ``high``, for the group of ``width`` inputs at ``first``."""

    low: Any
    high: Any
    first: Any
    scratch: Any

    @classmethod
    def of(cls, b: Writer, unit: Any, worker: Any) -> Unit:
        given = b.given
        group, part = b.sdiv(unit, given["n_slices"]), b.srem(unit, given["n_slices"])
        low, high = (
            b.sdiv(b.product(given["rows"], index), given["n_slices"])
            for index in (part, b.sum(part, I64(1)))
        )
        scratch = b.at(given["scratch"], b.product(worker, given["scratch_step"]))
        return cls(low, high, b.product(group, b.program.width), scratch)

    def rows_from(self, b: Writer, start: Any) -> list:
        """Return a few rows; the last one again if there are fewer."""
        last = b.sub(self.high, I64(1))
        return [b.smaller(b.sum(start, I64(r)), last) for r in range(b.program.rows)]

    def input(self, b: Writer, index: Any) -> Any:
        """Return the number of an input of the group; the last one again if there are fewer."""
        return b.smaller(b.sum(self.first, index), b.sub(b.given["n_inputs"], I64(1)))
