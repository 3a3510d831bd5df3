"""The kernel of compiled functions: threads, processes, changed tensors, and its absence."""

import logging
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_kernels import inputs_of, make_layer, matches
from torch import nn

from hf_quantnoise.modeling import pack_layer
from hf_quantnoise.modeling.kernels import Case, compiled, kernel_for
from hf_quantnoise.quantizers import AdditiveQuantizer, FixedPointQuantizer, ProductQuantizer

pytestmark = pytest.mark.skipif(not compiled.is_available(), reason="llvmlite is not installed")

QUANTIZERS = {
    "pq 2": ProductQuantizer(2, 16),
    "pq 4": ProductQuantizer(4, 200, 16),
    "pq 5 bits": ProductQuantizer(8, 31, row_scale=True),
    "pq 9 bits": ProductQuantizer(4, 300, n_iter=2),
    "pq 16": ProductQuantizer(16, 32, 8),
    "additive": AdditiveQuantizer(8, 31, row_scale=True),
    "int8": FixedPointQuantizer(8),
    "int8 channel": FixedPointQuantizer(8, "channel"),
}
COUNTS = (1, 2, 3, 4, 7, 9, 64)


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Threads even for little work, and slices that do not divide the rows."""
    monkeypatch.setattr(compiled, "CODES_PER_THREAD", 1)
    monkeypatch.setattr(compiled, "SLICE_ROWS", 150)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    compiled._plan.cache_clear()
    yield request.param
    torch.set_num_threads(before)
    compiled._plan.cache_clear()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", QUANTIZERS)
@torch.no_grad()
def test_outputs_match_float64(name):
    layer = make_layer(QUANTIZERS[name], 331, 48, bias=len(name) % 2 == 0)
    for count in COUNTS:
        for inputs in inputs_of(count, 48):
            case = Case.of(inputs)
            assert compiled.supports(layer, case) or isinstance(
                layer.quantizer, FixedPointQuantizer
            )
            if compiled.supports(layer, case):
                assert matches(layer, inputs, compiled.run(layer, inputs, case), 2e-6)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("method", ["lanes", "table"])
@pytest.mark.parametrize("name", ["pq 4", "pq 5 bits", "additive"])
@torch.no_grad()
def test_both_methods_for_several_inputs_match_float64(name, method, monkeypatch):
    # The constant decides which is used.
    monkeypatch.setattr(compiled, "COST_OF_TERM", 100 if method == "lanes" else -100)
    monkeypatch.setattr(compiled, "TABLE_BYTES", 2**14)  # more than one chunk
    layer = make_layer(QUANTIZERS[name], 331, 48, True)
    for count in (7, 33):
        assert compiled._program(331, 8, 5, 1, count, False).method == method
        inputs = inputs_of(count, 48)[0]
        assert matches(layer, inputs, compiled.run(layer, inputs, Case.of(inputs)), 2e-6)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("columns", [16, 64, 72])  # rows of a few bytes, of more, not of bytes
@pytest.mark.parametrize("bits", range(1, 10))
@torch.no_grad()
def test_codes_of_any_width_match_float64(bits, columns):
    layer = make_layer(ProductQuantizer(8, 2**bits - (bits > 1), n_iter=1), 331, columns, True)
    for count in (1, 9, 33):
        inputs = inputs_of(count, columns)[0]
        assert matches(layer, inputs, compiled.run(layer, inputs, Case.of(inputs)), 2e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_is_read_beyond_the_codes():
    """Put codes at the end of a page of memory, with a page after it that may not be read."""
    code = """
    import ctypes, mmap, sys, torch
    from test_kernels import inputs_of, make_layer
    from hf_quantnoise.modeling.kernels import Case, compiled
    from hf_quantnoise.quantizers import ProductQuantizer

    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    pages = mmap.mmap(-1, 4 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert libc.mprotect(ctypes.c_void_p(start + 3 * page), page, 0) == 0
    for bits in (3, 5, 9):
        for columns in (64, 72):
            layer = make_layer(ProductQuantizer(8, 2**bits, n_iter=1), 331, columns, True)
            packed = layer.weight_indices
            first = 3 * page - packed.numel()
            held = torch.frombuffer(pages, dtype=torch.uint8, offset=first, count=packed.numel())
            layer.weight_indices = held.view(packed.shape).copy_(packed)
            for count in (1, 9):
                inputs = inputs_of(count, columns)[0]
                with torch.no_grad():
                    outputs = compiled.run(layer, inputs, Case.of(inputs))
                assert outputs.isfinite().all()
    if sys.argv[1:]:  # that page is protected
        print(ctypes.string_at(start + 3 * page, 1))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    options = {"capture_output": True, "text": True, "cwd": os.path.dirname(__file__)}
    found = subprocess.run(command, **options, check=False)
    assert found.returncode == 0, found.stderr
    assert subprocess.run([*command, "read"], **options, check=False).returncode < 0


@pytest.mark.parametrize("name", ["pq 4", "int8"])
@torch.no_grad()
def test_number_of_threads_does_not_change_a_bit(name, monkeypatch):
    monkeypatch.setattr(compiled, "CODES_PER_THREAD", 1)
    layer, before = make_layer(QUANTIZERS[name], 331, 48, True), torch.get_num_threads()
    for count in (1, 9):
        inputs, found = inputs_of(count, 48)[0], []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(compiled.run(layer, inputs, Case.of(inputs)))
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    compiled._plan.cache_clear()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["pq 4", "additive", "int8 channel"])
def test_python_threads_get_their_own_results(name):
    layer = make_layer(QUANTIZERS[name], 331, 48, True)

    @torch.no_grad()
    def run(seed):
        inputs = inputs_of((1, 3, 8, 16)[seed % 4], 48, seed)[0]
        return matches(layer, inputs, layer(inputs), 2e-6)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(100)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_import_is_late_and_forked_processes_compute_the_same():
    code = """
    import os, signal, sys
    import torch
    import hf_quantnoise
    from hf_quantnoise.modeling import pack_layer
    from hf_quantnoise.modeling.kernels import Case, compiled, kernel_for
    from hf_quantnoise.quantizers import ProductQuantizer
    assert "llvmlite" not in sys.modules
    compiled.CODES_PER_THREAD = 1
    torch.set_num_threads(2)
    layer = torch.nn.Linear(64, 400)
    pack_layer(layer, ProductQuantizer(4, 16))
    inputs = torch.randn(20, 64)
    torch.set_grad_enabled(False)
    assert kernel_for(layer, Case.of(inputs)) == "compiled"
    expected = layer(inputs)
    if not os.fork():
        signal.alarm(60)
        same = torch.equal(layer(inputs), expected) and layer(inputs[:1]).isfinite().all()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


def test_it_is_not_used_if_gradients_are_recorded(monkeypatch):
    layer = make_layer(QUANTIZERS["pq 4"], 331, 48, True)
    monkeypatch.setattr(compiled, "run", None)
    inputs = torch.randn(3, 48, requires_grad=True)
    layer(inputs).square().sum().backward()
    assert layer.weight_codebook.grad.abs().sum() > 0 and inputs.grad.abs().sum() > 0


@torch.no_grad()
def test_changed_tensors_and_dtypes_count_at_once():
    layer, inputs = make_layer(QUANTIZERS["pq 4"], 331, 48, True), torch.randn(3, 48)
    first = layer(inputs)
    layer.weight_codebook.data.mul_(2)
    layer.bias.add_(1)
    layer.weight_indices.data = layer.weight_indices.data.flip(0).contiguous()
    assert matches(layer, inputs, layer(inputs), 2e-6)
    assert not torch.allclose(first, layer(inputs))
    layer.to(torch.bfloat16)
    few = inputs.bfloat16()
    assert kernel_for(layer, Case.of(few)) == "compiled" and layer(few).dtype == torch.bfloat16
    assert matches(layer, few, layer(few).float(), 2**-8)
    layer.to(torch.float64)
    assert kernel_for(layer, Case.of(inputs.double())) == "decode"
    assert matches(layer, inputs.double(), layer(inputs.double()), 1e-12)


@torch.no_grad()
def test_wrong_codes_give_nan():
    layer = make_layer(ProductQuantizer(8, 19), 331, 48, False)
    layer.weight_indices.fill_(255)
    for count in (1, 9):
        inputs = inputs_of(count, 48)[0]
        assert compiled.run(layer, inputs, Case.of(inputs)).isnan().all()


@torch.no_grad()
def test_kernel_is_chosen_by_layer_and_inputs():
    layer = make_layer(QUANTIZERS["pq 4"], 331, 48, True)
    chosen = {n: kernel_for(layer, Case(n)) for n in (0, 1, 64, 10**6)}
    assert chosen == {0: "decode", 1: "compiled", 64: "compiled", 10**6: "decode"}
    assert kernel_for(layer, Case(1, device="cuda")) == "decode"
    assert kernel_for(layer, Case(65, torch.bfloat16)) == "decode"
    with_table = make_layer(ProductQuantizer(8, 31), 331, 48, True)
    assert kernel_for(with_table, Case(10**6)) == "compiled"
    assert kernel_for(layer, Case(1, torch.bfloat16, is_autocast=True)) == "autocast"
    assert kernel_for(make_layer(ProductQuantizer(3, 16), 331, 48, True), Case(1)) == "decode"
    assert kernel_for(make_layer(FixedPointQuantizer(4), 331, 48, True), Case(1)) == "decode"
    assert kernel_for(make_layer(FixedPointQuantizer(8), 331, 40, True), Case(1)) == "decode"
    layer.kernels = ()
    assert kernel_for(layer, Case(1)) == "decode"


@pytest.fixture
def unloaded(monkeypatch):
    """Forget that llvmlite was imported."""
    names = [n for n in sys.modules if n.partition(".")[0] == "llvmlite"]
    names += [n for n in sys.modules if n.startswith(compiled.__name__ + ".")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
        if name.startswith(compiled.__name__):
            monkeypatch.delattr(compiled, name.rpartition(".")[2])
    compiled.is_available.cache_clear()
    yield monkeypatch
    compiled.is_available.cache_clear()


@torch.no_grad()
def test_without_llvmlite_another_kernel_computes(unloaded, tmp_path, caplog):
    layer, inputs = make_layer(QUANTIZERS["pq 4"], 331, 48, True), torch.randn(3, 48)
    unloaded.setitem(sys.modules, "llvmlite", None)
    assert not compiled.is_available() and not caplog.records
    assert kernel_for(layer, Case(3)) == "decode" and matches(layer, inputs, layer(inputs), 2e-6)
    unloaded.delitem(sys.modules, "llvmlite")
    (tmp_path / "llvmlite.py").write_text("raise OSError('libLLVM.so: no such file')")
    unloaded.syspath_prepend(tmp_path)
    compiled.is_available.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert matches(layer, inputs, layer(inputs), 2e-6) and matches(
            layer, inputs, layer(inputs), 2e-6
        )
    (record,) = caplog.records
    assert "OSError: libLLVM.so: no such file" in record.message
    assert "pip install 'hf-quantnoise[cpu]'" in record.message


@torch.no_grad()
def test_large_head_is_computed_in_slices():
    layer = nn.Linear(16, 40000, bias=False)
    pack_layer(layer, ProductQuantizer(8, 256, n_iter=1))
    for count in (1, 20):
        inputs = torch.randn(count, 16)
        assert kernel_for(layer, Case.of(inputs)) == "compiled"
        assert matches(layer, inputs, layer(inputs), 2e-6)
