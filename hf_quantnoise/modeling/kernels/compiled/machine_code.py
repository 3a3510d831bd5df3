"""Machine code for products of packed weights, made by LLVM for the processor it runs on.

Functions are specialized by :class:`Program`, compiled when they are first called (0.1 s each), and
kept for the lifetime of the process. They have no state; a call releases the GIL.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from typing import Any

from llvmlite import binding, ir

from ....compat.openmp import openmp
from .llvm import I32, I64, POINTER, VOID, Builder, compile_module
from .methods import dot, lanes, table, transposed
from .program import ARGUMENTS, Program, Unit, Writer

_compiling = threading.Lock()


def _unlock() -> None:
    """Replace the lock, which a thread of the parent process may hold."""
    global _compiling
    _compiling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


@cache
def _compiled(program: Program) -> tuple[Any, Any, Any]:
    """Return the function of a program, the address of the same for OpenMP, and their engine."""
    module = ir.Module()
    run = ir.Function(module, ir.FunctionType(VOID, [POINTER, I64, I64]), "run")
    b = Writer(run, program)
    _, first, step = run.args
    with b.loop(first, b.given["n_units"], step) as index:
        unit = Unit.of(b, index, first)
        if program.method == "dot":
            dot(b, unit)
        else:
            transposed(b, unit, lanes if program.method == "lanes" else table)
    b.ret_void()
    if openmp() is not None:
        task = ir.Function(module, ir.FunctionType(VOID, [POINTER]), "task")
        inner = Builder(task)
        numbers = []
        for name in ("omp_get_thread_num", "omp_get_num_threads"):
            binding.add_symbol(name, ctypes.cast(openmp()[name], ctypes.c_void_p).value)
            called = ir.Function(module, ir.FunctionType(I32, []), name)
            numbers.append(inner.zext(inner.call(called, []), I64))
        inner.call(run, [task.args[0], *numbers])
        inner.ret_void()
    engine = compile_module(module)
    types = (None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    function = ctypes.CFUNCTYPE(*types)(engine.get_function_address("run"))
    return function, engine.get_function_address("task"), engine


def call(program: Program, n_threads: int, *arguments: int) -> None:
    """Run a program on some of torch's threads, with the values of ``ARGUMENTS``."""
    with _compiling:
        function, task, _ = _compiled(program)
    given = (ctypes.c_int64 * len(ARGUMENTS))(*arguments)
    if n_threads == 1:
        function(ctypes.addressof(given), 0, 1)
    else:
        openmp().GOMP_parallel(ctypes.c_void_p(task), given, n_threads, 0)
