"""Each kernel against float64, over shapes, strides and threads."""

import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from hf_quantnoise.blocks import weight_matrix
from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.modeling.kernels import KERNELS, Case, case, kernel_for
from hf_quantnoise.quantizers import AdditiveQuantizer, FixedPointQuantizer, ProductQuantizer
from hf_quantnoise.quantizers.fixed_point import round_activations

QUANTIZERS = {
    "pq 4": ProductQuantizer(4, 16),
    "pq 8": ProductQuantizer(8, 16, 16),
    "pq 16": ProductQuantizer(16, 32),
    "pq scaled": ProductQuantizer(8, 16, row_scale=True),
    "pq int8": ProductQuantizer(8, 16, 8),
    "pq int8 scaled": ProductQuantizer(8, 16, 8, row_scale=True),
    "additive": AdditiveQuantizer(8, 16),
    "int8": FixedPointQuantizer(8),
    "int4 channel": FixedPointQuantizer(4, "channel"),
}
SHAPES = [(96, 32, True), (250, 48, False), (400, 64, True)]  # rows, columns, bias
COUNTS = (1, 5, 64, 300)


def make_layer(quantizer, rows, columns, bias, activation_bits=None, cls=nn.Linear):
    generator = torch.Generator().manual_seed(rows)
    layer = Conv1D(rows, columns) if cls is Conv1D else cls(columns, rows, bias=bias)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) + 0.3
    pack_layer(layer, quantizer, activation_bits=activation_bits)
    if activation_bits:
        layer.input_scale.fill_(6 / 2**activation_bits)
        layer.input_zero_point.fill_(0.4 * 2**activation_bits // 1)
    return layer.eval()


def inputs_of(count, columns, seed=0):
    """Inputs of one shape with the usual strides, and with others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, columns, generator=generator)
    return [
        rows,
        rows.view(1, count, columns),
        rows.t().contiguous().t(),
        rows.repeat_interleave(2, 1)[:, 1::2],
    ]


def reference(layer, inputs):
    """The product in float64, and a bound: rounding is relative to the sum of absolute values."""
    matrix = weight_matrix(layer).double()
    if layer.activation_bits:
        state = {"scale": layer.input_scale, "zero_point": layer.input_zero_point}
        inputs = round_activations(inputs, state, layer.activation_bits)
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(inputs.double(), matrix, bias), inputs.double().abs() @ matrix.abs().t()


def matches(layer, inputs, outputs, precision):
    expected, size = reference(layer, inputs)
    assert outputs.shape == expected.shape
    errors = (outputs.double() - expected).abs() / (size + 1)
    assert float(errors.max()) < precision
    return True


@pytest.fixture(params=[None, 4000], ids=["one slice", "slices"])
def scratch(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(case, "SCRATCH_BYTES", request.param)


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTIZERS)
@torch.no_grad()
def test_every_kernel_that_supports_a_layer_matches_float64(name, shape):
    for bits in (None, 8, 4):
        layer = make_layer(QUANTIZERS[name], *shape, activation_bits=bits)
        for count in COUNTS:
            for inputs in inputs_of(count, shape[1]):
                for kernel in KERNELS.values():
                    if not (kernel.supports(layer, Case.of(inputs)) and kernel.is_available()):
                        continue
                    rounds = kernel is KERNELS["int8"]
                    taken = inputs if rounds or not bits else rounded(layer, inputs)
                    assert matches(layer, inputs, kernel.run(layer, taken, Case.of(inputs)), 2e-6)


def rounded(layer, inputs):
    state = {"scale": layer.input_scale, "zero_point": layer.input_zero_point}
    return round_activations(inputs, state, layer.activation_bits)


@pytest.mark.parametrize("name", ["pq 4", "pq 8", "pq int8", "additive", "int8"])
@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_inputs_that_do_not_fit_are_an_error(name, bits):
    layer = make_layer(QUANTIZERS[name], 400, 64, True, activation_bits=bits)
    for shape in ((2, 128), (4, 32), (64, 1), (2, 3, 65), (3, 0), ()):
        with pytest.raises((ValueError, RuntimeError)):
            layer(torch.randn(shape))


@pytest.mark.parametrize("name", ["compiled", "triton"])
@torch.no_grad()
def test_kernels_that_read_memory_check_it(name):
    kernel, layer = KERNELS[name], make_layer(QUANTIZERS["pq 8"], 400, 64, True)
    if name == "compiled" and not kernel.is_available():
        pytest.skip("llvmlite is not installed")
    for shape in ((4, 32), (2, 128), ()):
        expected = re.escape(f"shape of inputs: got {shape}, expected (..., 64)")
        with pytest.raises(ValueError, match=expected):
            kernel.run(layer, torch.randn(shape), Case(4))
    for part in ("weight_indices", "weight_codebook", "bias"):
        elsewhere = deepcopy(layer)
        tensor = getattr(elsewhere, part).to("meta")
        elsewhere.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        with pytest.raises(ValueError, match=r"device of inputs: got cpu, expected .* meta"):
            kernel.run(elsewhere, torch.randn(4, 64), Case(4))


@pytest.mark.parametrize("change", ["dtype(torch.bfloat16)", "device('meta')"])
def test_defaults_of_torch_do_not_change_results(change):
    """In a separate process, as kernels create tensors when they are imported."""
    code = f"""
    import sys, torch
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    torch.set_default_{change}
    from test_kernels import KERNELS, QUANTIZERS, Case, make_layer, matches
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    layers = [make_layer(quantizer, 400, 64, False) for quantizer in QUANTIZERS.values()]
    inputs = torch.randn(3, 64)
    torch.set_default_{change}
    torch.set_grad_enabled(False)
    for layer in layers:
        for kernel in KERNELS.values():
            if kernel.supports(layer, Case.of(inputs)) and kernel.is_available():
                assert matches(layer, inputs, kernel.run(layer, inputs, Case.of(inputs)), 2e-6)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


@torch.no_grad()
def test_layers_use_the_kernel_of_their_regime(monkeypatch):
    monkeypatch.setattr(KERNELS["compiled"], "is_available", lambda: False)
    few, many = Case(4), Case(512)
    wide = make_layer(QUANTIZERS["pq 8"], 400, 64, True)
    assert kernel_for(wide, few) == "tables" and kernel_for(wide, many) == "decode"
    assert kernel_for(make_layer(QUANTIZERS["pq 4"], 400, 64, True), few) == "decode"
    assert kernel_for(make_layer(QUANTIZERS["pq 8"], 64, 64, True), few) == "decode"
    assert kernel_for(wide, Case(4, torch.bfloat16)) == "decode"
    assert kernel_for(wide, Case(4, torch.bfloat16, is_autocast=True)) == "autocast"
    assert kernel_for(wide, Case(0)) == "decode"
    int8 = make_layer(QUANTIZERS["pq int8"], 96, 32, True, activation_bits=8)
    assert kernel_for(int8, few) == ("int8" if KERNELS["int8"].is_available() else "tables")
    int8.kernels = ()
    assert kernel_for(int8, few) == "decode"


@pytest.mark.skipif(not KERNELS["int8"].is_available(), reason="the processor has no VNNI")
@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@pytest.mark.parametrize("name", ["pq int8", "int8", "int4 channel"])
@torch.no_grad()
def test_layer_forward_in_integers_gives_what_rounded_floats_give(name, cls, monkeypatch):
    layer = make_layer(QUANTIZERS[name], 96, 32, True, activation_bits=8, cls=cls)
    layer.kernels = ("int8",)
    used = []
    original = KERNELS["int8"].run
    monkeypatch.setattr(KERNELS["int8"], "run", lambda *args: used.append(1) or original(*args))
    inputs = 3 * torch.randn(2, 7, 32)
    assert matches(layer, inputs, layer(inputs), 2e-6) and used == [1]
    layer.kernels = ()
    assert matches(layer, inputs, layer(inputs), 2e-6) and used == [1]


@pytest.mark.skipif(not KERNELS["int8"].is_available(), reason="the processor has no VNNI")
@pytest.mark.skipif(not KERNELS["compiled"].is_available(), reason="llvmlite is not installed")
@pytest.mark.parametrize(("name", "most"), [("pq int8", 32), ("int8", 16), ("int4 channel", 0)])
@torch.no_grad()
def test_few_rounded_inputs_are_multiplied_in_floats_and_many_in_integers(name, most):
    layer = make_layer(QUANTIZERS[name], 96, 32, True, activation_bits=8)
    for count in (1, 7, 16, 17, 32, 33):
        expected = "compiled" if count <= most else "int8"
        assert kernel_for(layer, Case(count)) == expected
        inputs = 3 * torch.randn(count, 32)
        assert matches(layer, inputs, layer(inputs), 2e-6)


@torch.no_grad()
def test_subclasses_that_may_read_their_inputs_get_rounded_floats():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    layer = make_layer(QUANTIZERS["int8"], 96, 32, True, activation_bits=8, cls=Doubled)
    inputs = torch.randn(5, 32)
    assert matches(layer, inputs, layer(inputs) / 2, 2e-6)


def test_gradients_are_those_of_decoded_weights():
    layer = make_layer(QUANTIZERS["pq int8"], 96, 32, True, activation_bits=8).train()
    inputs = torch.randn(5, 32, requires_grad=True)
    layer(inputs).square().sum().backward()
    assert layer.weight_codebook.grad.abs().sum() > 0 and inputs.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["pq 4", "pq 8"])
@torch.no_grad()
def test_autocast_gives_the_bits_of_a_weight_rounded_after_decoding(name):
    layer = make_layer(QUANTIZERS[name], 96, 32, True)
    inputs = torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs)
    layer.kernels = ()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs, layer(inputs)) and outputs.dtype == torch.bfloat16


@torch.no_grad()
def test_bfloat16_layers_match_float64_to_their_precision():
    for name in ("pq 4", "pq 8", "int8"):
        layer = make_layer(QUANTIZERS[name], 96, 32, True, activation_bits=8).to(torch.bfloat16)
        inputs = torch.randn(5, 32).bfloat16()
        assert matches(layer, inputs, layer(inputs).float(), 2**-7)


@pytest.mark.parametrize("kernels", [("compiled",), ("tables",)])
@torch.no_grad()
def test_layers_run_in_vmap_and_forward_mode_differentiation(kernels):
    layer = make_layer(QUANTIZERS["pq 8"], 400, 64, True)
    layer.kernels = kernels
    inputs, tangent = torch.randn(3, 2, 64), torch.randn(3, 2, 64)
    assert matches(layer, inputs, torch.vmap(layer)(inputs), 2e-6)
    found, derivative = torch.func.jvp(layer, (inputs,), (tangent,))
    expected = tangent @ weight_matrix(layer).t()
    assert matches(layer, inputs, found, 2e-6)
    torch.testing.assert_close(derivative, expected, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(inputs, tangent)))
        torch.testing.assert_close(dual.tangent, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pq 4", "pq 8", "pq int8", "int8"])
def test_threads_get_their_own_results(name):
    layer = make_layer(QUANTIZERS[name], 400, 64, True, activation_bits=8)

    @torch.no_grad()
    def run(seed):
        inputs = inputs_of(1 + seed % 9, 64, seed)[0]
        return matches(layer, inputs, layer(inputs), 2e-6)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(100)))
