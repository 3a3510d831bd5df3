"""Three methods to multiply inputs with a packed weight, as instructions for LLVM.

Each reads codes and centroids, and adds up products in registers: the decoded weight is never in
memory. They take ``width`` inputs at a time:

- ``dot``: a centroid times a block of each input, added to a vector of ``block_size`` sums;
- ``lanes``: a value of a centroid times a vector of ``width`` inputs;
- ``table``: products of all centroids and ``width`` inputs, for a few blocks at a time, from which
  codes select terms (one addition for a block instead of ``block_size``).
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from llvmlite import ir

from .llvm import F32, I64, vector
from .program import Unit, Writer


def write_output(b: Writer, total: Any, row: Any, number: Any) -> None:
    """Write the output of a row and an input: a sum times the scale of the row, plus its bias."""
    given = b.given
    scale = b.read(given["scale"], b.product(row, given["scale_step"]), F32)
    bias = b.read(given["bias"], b.product(row, given["bias_step"]), F32)
    index = b.sum(b.product(number, given["rows"]), row)
    b.write(b.fma(total, scale, bias), given["outputs"], index)


def dot(b: Writer, unit: Unit) -> None:
    """Write a unit, adding up ``block_size`` sums for each row and input."""
    program, given = b.program, b.given
    of, width = vector(program.block_size), program.width
    numbers = [unit.input(b, I64(n)) for n in range(width)]
    sums = [[b.variable(of) for _ in range(width)] for _ in range(program.rows)]
    with b.loop(unit.low, unit.high, I64(program.rows)) as start:
        rows = unit.rows_from(b, start)
        for variable in chain(*sums):
            b.store(ir.Constant(of, None), variable)
        with b.loop(I64(0), given["blocks"], I64(1)) as block:
            blocks = [
                b.product(b.sum(b.product(number, given["blocks"]), block), of.count)
                for number in numbers
            ]
            values = [b.read(given["inputs"], index, of, F32) for index in blocks]
            for row, variables in zip(rows, sums, strict=True):
                weights = b.weights(row, block)
                for variable, value in zip(variables, values, strict=True):
                    b.add_to(variable, weights, value)
        for row, variables in zip(rows, sums, strict=True):
            for variable, number in zip(variables, numbers, strict=True):
                write_output(b, b.total(b.load(variable, typ=of)), row, number)


def transposed(b: Writer, unit: Unit, method: Any) -> None:
    """Write a unit with ``lanes`` or ``table``, on transposed inputs and outputs in the scratch."""
    program, given = b.program, b.given
    width, columns = program.width, b.product(given["blocks"], program.block_size)
    inputs = unit.scratch
    outputs = b.at(inputs, b.product(columns, width))
    with b.loop(I64(0), I64(width), I64(1)) as lane:
        own = b.at(given["inputs"], b.product(unit.input(b, lane), columns))
        with b.loop(I64(0), columns, I64(1)) as column:
            value = b.read(own, column, F32)
            b.write(value, inputs, b.sum(b.product(column, width), lane))
    method(b, unit, inputs, outputs)
    with b.loop(I64(0), I64(width), I64(1)) as lane:
        number = unit.input(b, lane)
        with b.loop(unit.low, unit.high, I64(1)) as row:
            index = b.sum(b.product(b.sub(row, unit.low), width), lane)
            write_output(b, b.read(outputs, index, F32), row, number)


def outputs_of(b: Writer, unit: Unit, outputs: Any, rows: list) -> list:
    """Return pointers to the transposed outputs of some rows."""
    return [b.at(outputs, b.product(b.sub(row, unit.low), b.program.width)) for row in rows]


def lanes(b: Writer, unit: Unit, inputs: Any, outputs: Any) -> None:
    """Write transposed outputs: a value of a centroid times a vector of inputs, for each column."""
    program, given = b.program, b.given
    of, size = vector(program.width), program.block_size
    sums = [b.variable(of) for _ in range(program.rows)]
    with b.loop(unit.low, unit.high, I64(program.rows)) as start:
        rows = unit.rows_from(b, start)
        for variable in sums:
            b.store(ir.Constant(of, None), variable)
        with b.loop(I64(0), given["blocks"], I64(1)) as block:
            first = [
                [b.product(b.centroid(row, block, k), size) for k in range(program.n_codebooks)]
                for row in rows
            ]
            for t in range(size):
                column = b.product(b.sum(b.product(block, size), I64(t)), of.count)
                value = b.read(inputs, column, of, F32)
                for variable, books in zip(sums, first, strict=True):
                    for index in books:
                        weight = b.read(given["codebook"], b.sum(index, I64(t)), F32)
                        b.add_to(variable, b.splat(weight, of.count), value)
        for variable, pointer in zip(sums, outputs_of(b, unit, outputs, rows), strict=True):
            b.write(b.load(variable, typ=of), pointer, I64(0))


def table(b: Writer, unit: Unit, inputs: Any, outputs: Any) -> None:
    """Write transposed outputs: sums of products of centroids and inputs, a chunk at a time."""
    program, given = b.program, b.given
    of = vector(program.width)
    size = b.product(given["n_centroids"], program.n_codebooks)
    n_rows = b.sub(unit.high, unit.low)
    products = b.at(outputs, b.product(n_rows, of.count))
    sums = [b.variable(of) for _ in range(program.rows)]
    with b.loop(I64(0), n_rows, I64(1)) as row:
        b.write(ir.Constant(of, None), outputs, b.product(row, of.count))
    with b.loop(I64(0), given["blocks"], given["chunk"]) as low:
        high = b.smaller(b.sum(low, given["chunk"]), given["blocks"])
        with b.loop(low, high, I64(1)) as block:
            fill_table(
                b, block, inputs, b.at(products, b.product(b.sub(block, low), size, of.count))
            )
        with b.loop(unit.low, unit.high, I64(program.rows)) as start:
            rows = unit.rows_from(b, start)
            pointers = outputs_of(b, unit, outputs, rows)
            for variable, pointer in zip(sums, pointers, strict=True):
                b.store(b.read(pointer, I64(0), of), variable)
            with b.loop(low, high, I64(1)) as block:
                base = b.product(b.sub(block, low), size)
                for variable, row in zip(sums, rows, strict=True):
                    for book in range(program.n_codebooks):
                        entry = b.sum(base, b.centroid(row, block, book))
                        term = b.read(products, b.product(entry, of.count), of, F32)
                        b.add_to(variable, term)
            for variable, pointer in zip(sums, pointers, strict=True):
                b.write(b.load(variable, typ=of), pointer, I64(0))


def fill_table(b: Writer, block: Any, inputs: Any, products: Any) -> None:
    """Write the products of all centroids and a block of each input."""
    program, given = b.program, b.given
    of, size = vector(program.width), program.block_size
    columns = [b.sum(b.product(block, size), I64(t)) for t in range(size)]
    values = [b.read(inputs, b.product(column, of.count), of, F32) for column in columns]
    with b.loop(I64(0), b.product(given["n_centroids"], program.n_codebooks), I64(1)) as row:
        total = ir.Constant(of, None)
        for t, value in enumerate(values):
            weight = b.read(given["codebook"], b.sum(b.product(row, size), I64(t)), F32)
            total = b.fma(b.splat(weight, of.count), value, total)
        b.write(total, products, b.product(row, of.count))
