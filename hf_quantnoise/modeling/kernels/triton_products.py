"""On a GPU: decode tiles of the weight in registers and multiply them there, with Triton.

``triton_code.py`` has the Triton code. Triton comes with the CUDA builds of torch. The code was
checked with Triton's interpreter on a CPU and compiled for GPUs. It has not run on one yet.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...quantizers import ProductQuantizer
from ...quantizers.half import to_half
from .case import MANY, Case, check_inputs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (2, 4, 8, 16)
MAX_BITS = 8
MIN_CAPABILITY = (8, 0)  # the oldest that Triton supports
# Each tile of outputs decodes its part of the weight again. With more inputs than this it is less
# work to decode the weight once. The limits are estimates: nothing was measured on a GPU yet.
MAX_INPUTS = 512
MAX_INPUTS_FLOAT32 = 64  # without tensor cores
HINT = (
    "the kernel 'triton' of hf_quantnoise failed; to compute without it, run "
    "`for _, layer in hf_quantnoise.modeling.packed_layers(model): layer.kernels = ()`"
)


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Return whether Triton, what it needs to compile, and only new enough GPUs are there."""
    return _is_available()


@cache
def _is_available() -> bool:
    if find_spec("triton") is None or not torch.cuda.is_available() or torch.version.hip:
        return False
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang"))), "")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    gpus = range(torch.cuda.device_count())
    return (
        bool(compiler)
        and os.path.isfile(header)
        and all(torch.cuda.get_device_capability(gpu) >= MIN_CAPABILITY for gpu in gpus)
    )


def supports(layer: Any, case: Case) -> bool:
    """Return whether inputs on a GPU meet a weight of one small codebook.

    Graphs that are exported, or traced for another machine, cannot use Triton.
    """
    quantizer = layer.quantizer
    if case.device != "cuda" or case.dtype not in DTYPES or type(quantizer) is not ProductQuantizer:
        return False
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    few = MAX_INPUTS_FLOAT32 if case.dtype == torch.float32 else MAX_INPUTS
    return (
        (case.n_inputs <= few or case.n_inputs == MANY)
        and (case.is_autocast or layer.state["codebook"].dtype == case.dtype)
        and quantizer.block_size in BLOCK_SIZES
        and quantizer.code_bits <= MAX_BITS
    )


def run(layer: Any, inputs: Tensor, case: Case) -> Tensor:
    """Return the outputs, in the dtype of the case."""
    quantizer, state = layer.quantizer, layer.state
    halves = quantizer.codebook_bits == 16
    codebook = to_half(state["codebook"]) if halves else quantizer.centroids(state)
    scales = to_half(state["row_scale"]).view(-1) if quantizer.row_scale else None
    check_inputs(layer, inputs, layer.weight_indices, codebook, scales, layer.bias)
    return torch.ops.hf_quantnoise.product_with_codes.default(
        inputs, layer.weight_indices, codebook, scales, layer.bias,
        layer.rows, quantizer.code_bits, case.dtype,
    )  # fmt: skip


# One operation, so that a compiled graph has one node for a layer. With ``custom_op`` of
# ``torch.library``, each call would take 9 us longer.
torch.library.define(
    "hf_quantnoise::product_with_codes",
    "(Tensor inputs, Tensor codes, Tensor codebook, Tensor? scales, Tensor? bias, int rows, "
    "int bits, ScalarType dtype) -> Tensor",
)


@torch.library.register_fake("hf_quantnoise::product_with_codes")
def _empty_outputs(inputs, codes, codebook, scales, bias, rows, bits, dtype):
    """Return the outputs without values."""
    return inputs.new_empty(*inputs.shape[:-1], rows, dtype=dtype)


def product_with_codes(
    inputs: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``inputs @ weight.T + bias``.

    Args:
        inputs: (..., columns).
        codes: packed codes of the weight, row by row without gaps.
        codebook: (K, block size).
        scales: (rows,), a scale for each row of the weight, or None.
        bias: (rows,), or None.
        rows: number of rows of the weight.
        bits: number of bits of a code, 1 to 8.
        dtype: of the products and the outputs (..., rows).
    """
    outputs = _empty_outputs(inputs, codes, codebook, scales, bias, rows, bits, dtype)
    if outputs.numel() == 0:
        return outputs
    flat = inputs.reshape(-1, inputs.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    try:
        from .triton_code import write_products

        write_products(
            flat, codes.reshape(-1), codebook.contiguous(), scales, bias,
            outputs.view(-1, rows), bits, _float32_precision(),
        )  # fmt: skip
    except Exception as error:  # of Triton's compiler, or of the GPU
        error.add_note(HINT)
        raise
    return outputs


# On a CPU for Triton's interpreter only.
torch.library.impl("hf_quantnoise::product_with_codes", ("cuda", "cpu"), product_with_codes)


def _float32_precision() -> str:
    """Return how torch multiplies float32 matrices on a GPU, in the words of Triton."""
    matmul = torch.backends.cuda.matmul
    # torch >= 2.9; there, reading ``allow_tf32`` may raise.
    precision = getattr(matmul, "fp32_precision", None)
    uses_tf32 = matmul.allow_tf32 if precision is None else precision == "tf32"
    return "tf32" if uses_tf32 else "ieee"
