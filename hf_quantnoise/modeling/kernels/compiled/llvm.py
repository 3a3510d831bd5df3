"""Writes functions for LLVM with llvmlite, and compiles them for the processor of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from llvmlite import binding, ir

I8, I32, I64 = (ir.IntType(bits) for bits in (8, 32, 64))
F32, POINTER, VOID = ir.FloatType(), ir.PointerType(), ir.VoidType()


def vector(size: int, of: ir.Type = F32) -> ir.VectorType:
    """Return the type of a vector, of float32 by default."""
    return ir.VectorType(of, size)


@cache
def has_wide_registers() -> bool:
    """Return whether a register holds 16 float32 (AVX-512)."""
    return bool(binding.get_host_cpu_features().get("avx512f"))


def compile_module(module: ir.Module) -> Any:
    """Return an engine, which gives addresses of functions and must be kept for their lifetime."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    passes = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, target)
    engine.finalize_object()
    return engine


class Builder(ir.IRBuilder):
    """Writes instructions of one function. Variables become registers when it is optimized."""

    def __init__(self, function: ir.Function) -> None:
        entry, start = (function.append_basic_block(name) for name in ("entry", "start"))
        super().__init__(entry)
        self.branch(start)
        self.position_at_end(start)

    def variable(self, of: ir.Type) -> Any:
        with self.goto_entry_block():
            return self.alloca(of)

    @contextmanager
    def loop(self, start: Any, stop: Any, step: Any) -> Iterator[Any]:
        """Repeat the instructions written inside the context, for each value of a counter."""
        counter = self.variable(I64)
        self.store(start, counter)
        head, body, end = (self.append_basic_block(name) for name in ("head", "body", "end"))
        self.branch(head)
        self.position_at_end(head)
        self.cbranch(self.icmp_signed("<", self.load(counter, typ=I64), stop), body, end)
        self.position_at_end(body)
        value = self.load(counter, typ=I64)
        yield value
        self.store(self.add(value, step), counter)
        self.branch(head)
        self.position_at_end(end)

    def sum(self, *terms: Any) -> Any:
        total, *others = terms
        for term in others:
            total = self.add(total, term)
        return total

    def product(self, *factors: Any) -> Any:
        total, *others = (I64(f) if isinstance(f, int) else f for f in factors)
        for factor in others:
            total = self.mul(total, factor)
        return total

    def smaller(self, first: Any, second: Any) -> Any:
        return self.select(self.icmp_signed("<", first, second), first, second)

    def at(self, pointer: Any, index: Any, of: ir.Type = F32) -> Any:
        return self.gep(pointer, [index], source_etype=of)

    def read(self, pointer: Any, index: Any, of: ir.Type, unit: ir.Type | None = None) -> Any:
        """Return the value of a type at an index, which counts elements of the type ``unit``."""
        align = 1 if unit == I8 else 4
        return self.load(self.at(pointer, index, unit or of), typ=of, align=align)

    def write(self, value: Any, pointer: Any, index: Any) -> None:
        self.store(value, self.at(pointer, index), align=4)

    def add_to(self, variable: Any, first: Any, second: Any = None) -> None:
        """Add a value, or the product of two, to a variable."""
        old = self.load(variable, typ=first.type)
        new = self.fadd(first, old) if second is None else self.fma(first, second, old)
        self.store(new, variable)

    def fma(self, first: Any, second: Any, third: Any) -> Any:
        of = third.type
        suffix = f"v{of.count}f32" if isinstance(of, ir.VectorType) else "f32"
        return self.intrinsic(f"llvm.fma.{suffix}", of, [first, second, third])

    def total(self, values: Any) -> Any:
        """Return the sum of a vector, in any order."""
        name = f"llvm.vector.reduce.fadd.v{values.type.count}f32"
        return self.intrinsic(name, F32, [F32(0.0), values], fastmath=("reassoc",))

    def intrinsic(self, name: str, of: ir.Type, arguments: list, **options: Any) -> Any:
        known = self.module.globals.get(name)
        types = [argument.type for argument in arguments]
        function = known or ir.Function(self.module, ir.FunctionType(of, types), name)
        return self.call(function, arguments, **options)

    def splat(self, value: Any, size: int) -> Any:
        unset, zeros = ir.Constant(vector(size), ir.Undefined), ir.VectorType(I32, size)
        one = self.insert_element(unset, value, I32(0))
        return self.shuffle_vector(one, unset, ir.Constant(zeros, None))
