"""The kernel ``triton``: when it is used, its results in Triton's interpreter, its GPU code."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_kernels import QUANTIZERS, make_layer

from hf_quantnoise.modeling.kernels import KERNELS, Case, kernel_for, triton_products
from hf_quantnoise.quantizers import ProductQuantizer

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_results_in_the_interpreter():
    """In a separate process: Triton reads the variable when its functions are defined."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         HERE / "triton_in_interpreter.py"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_triton_code_is_not_imported_on_a_cpu():
    code = (
        "import sys, torch, hf_quantnoise.modeling as m; from hf_quantnoise.quantizers import *;"
        "layer = torch.nn.Linear(32, 64); m.pack_layer(layer, ProductQuantizer(8, 16));"
        "torch.no_grad().__enter__(); layer(torch.randn(2, 32)); torch.compile(layer);"
        "assert not [name for name in sys.modules if name.endswith('triton_code')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


GPU = {"device": "cuda"}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(1, **GPU), True),
        (Case(triton_products.MAX_INPUTS_FLOAT32, **GPU), True),
        (Case(triton_products.MAX_INPUTS_FLOAT32 + 1, **GPU), False),
        (Case(1, device="cpu"), False),
        (Case(1, torch.float64, **GPU), False),
        (Case(1, torch.bfloat16, **GPU), False),  # F.linear rejects mixed dtypes
        (Case(1, torch.bfloat16, is_autocast=True, **GPU), True),
        (Case(triton_products.MAX_INPUTS, torch.float16, is_autocast=True, **GPU), True),
        (Case(triton_products.MAX_INPUTS + 1, torch.float16, is_autocast=True, **GPU), False),
    ],
    ids=str,
)
def test_triton_supports_inputs(case, expected):
    assert triton_products.supports(make_layer(QUANTIZERS["pq 8"], 96, 32, True), case) == expected


def test_triton_supports_one_small_codebook():
    supported = {"pq 4", "pq 8", "pq 16", "pq scaled", "pq int8", "pq int8 scaled"}
    found = {
        name: make_layer(quantizer, 96, 64, True) for name, quantizer in QUANTIZERS.items()
    } | {
        "pq 32": make_layer(ProductQuantizer(32, 16), 96, 64, True),
        "9 bits": make_layer(ProductQuantizer(2, 257), 96, 64, True),
    }
    case = Case(4, **GPU)
    assert {name for name in found if triton_products.supports(found[name], case)} == supported


def test_layers_on_a_gpu_use_triton_where_it_is_available(monkeypatch):
    layer = make_layer(QUANTIZERS["pq 8"], 400, 64, True)
    few, many = Case(4, **GPU), Case(4096, **GPU)
    half = Case(4, torch.bfloat16, is_autocast=True, **GPU)
    for available, names in ((True, ["triton", "decode", "triton"]),
                             (False, ["decode", "decode", "autocast"])):  # fmt: skip
        monkeypatch.setattr(triton_products, "is_available", lambda found=available: found)
        assert [kernel_for(layer, case) for case in (few, many, half)] == names
    monkeypatch.setattr(triton_products, "is_available", lambda: True)
    layer.kernels = [name for name in KERNELS if name != "triton"]
    assert kernel_for(layer, few) == "decode"


def availability(monkeypatch, **changes):
    """Return whether the kernel is available on a machine with a GPU, but for some changes."""
    found = {"spec": True, "cuda": True, "hip": None, "gpus": [(9, 0)], "compiler": "/usr/bin/gcc",
             "header": True} | changes  # fmt: skip
    cuda = SimpleNamespace(
        is_available=lambda: found["cuda"],
        device_count=lambda: len(found["gpus"]),
        get_device_capability=lambda gpu: found["gpus"][gpu],
    )
    with monkeypatch.context() as patch:
        patch.delenv("CC", raising=False)
        patch.setattr(triton_products, "find_spec", lambda name: found["spec"] or None)
        patch.setattr(torch, "cuda", cuda)
        patch.setattr(torch.version, "hip", found["hip"])
        patch.setattr(triton_products.shutil, "which", lambda name: found["compiler"])
        patch.setattr(triton_products.os.path, "isfile", lambda path: found["header"])
        triton_products._is_available.cache_clear()
        available = triton_products.is_available()
    triton_products._is_available.cache_clear()
    return available


def test_triton_needs_cuda_a_recent_gpu_and_a_compiler(monkeypatch):
    assert availability(monkeypatch)
    assert availability(monkeypatch, gpus=[(8, 0), (12, 0)])
    for change in (
        {"spec": False}, {"cuda": False}, {"hip": "6.4"}, {"gpus": [(9, 0), (7, 5)]},
        {"compiler": None}, {"header": False},
    ):  # fmt: skip
        assert not availability(monkeypatch, **change), change


def test_float32_products_follow_the_setting_of_torch(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(setting)
            assert triton_products._float32_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)
    old = SimpleNamespace(allow_tf32=True)  # torch < 2.9
    monkeypatch.setattr(torch.backends.cuda, "matmul", old)
    assert triton_products._float32_precision() == "tf32"


def test_availability_is_a_constant_of_graphs():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda inputs: inputs + triton_products.is_available(), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(1)).item() == triton_products.is_available()


GPUS = [80, *(pytest.param(gpu, marks=pytest.mark.slow) for gpu in (89, 90, 100, 120))]
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_quantnoise.modeling.kernels import triton_code as code

def compile(function, dtype, options, **more):
    constants = {k: v for k, v in options.items() if k.isupper()} | more | {"scales": None}
    types = {"inputs": dtype, "bias": dtype, "outputs": dtype, "codes": "*u8", "codebook": "*fp16"}
    names = [p.name for p in function.params]
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
    source = ASTSource(function, signature, constants, aligned)
    return triton.compile(source, GPUTarget("cuda", int(sys.argv[1]), 32),
                          {k: v for k, v in options.items() if not k.isupper()})

few = {"ROWS": code.FEW_ROWS, "COLUMNS": code.FEW_COLUMNS}
made = [compile(code.few_inputs, "*fp16", few, BITS=8, SIZE=4)]
for dtype, name in ((code.torch.float32, "*fp32"), (code.torch.bfloat16, "*bf16")):
    made.append(compile(code.many_inputs, name, code.tile_of(512, dtype), BITS=8, SIZE=8,
                        PRECISION="ieee"))
for kernel in made:
    assert kernel.asm["cubin"] and kernel.metadata.shared <= 99 * 1024
# A centroid is copied at once: 4 values of 2 bytes.
assert "ld.global.v2.b32" in made[0].asm["ptx"]
assert "mma" in made[2].asm["ptx"] and "tf32" not in made[1].asm["ptx"]
"""


@needs_triton
@pytest.mark.parametrize("gpu", GPUS)
def test_code_compiles_for_gpus(gpu, tmp_path):
    """Without one: uses of shared memory and tensor cores, and that float32 is not TF32."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(gpu)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
