"""Products in fewer bits with torch: which a machine computes fast, and private operations."""

from __future__ import annotations

import platform
import warnings

import torch
from torch import Tensor


def has_int8_products() -> bool:
    """Return whether this processor multiplies 8-bit integers, so that it is fast."""
    return torch.cpu._is_vnni_supported() and torch.backends.quantized.engine != "none"


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def has_saturating_int8_products() -> bool:
    """Return whether sums of two products of uint8 and int8 may saturate in 16 bits (AVX2)."""
    known: dict = getattr(torch.cpu, "get_capabilities", dict)()  # not in the oldest versions
    return _is_x86() and not torch.cpu._is_vnni_supported() and not known.get("avx_vnni", False)


def has_bf16_products(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware, so that it is fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    if _is_x86():  # without these, emulated with AVX-512
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    # The operation is not in builds without oneDNN.
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def int8_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return ``inputs @ weight.T`` of int8 matrices, with sums in int32."""
    return torch._int_mm(inputs, weight.t())


def prepacked_int8(weight: Tensor, bias: Tensor | None) -> torch.ScriptObject:
    """Return a float32 weight (rows, columns) in torch's int8 form, with a scale for each row."""
    scale = weight.abs().amax(1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():  # torch recommends torchao, which has no such form
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantized, bias)


def dynamic_int8_linear(inputs: Tensor, weight: torch.ScriptObject) -> Tensor:
    """Return float32 products of inputs, rounded to 8 bits, and a :func:`prepacked_int8`."""
    return torch.ops.quantized.linear_dynamic(inputs, weight, False)
