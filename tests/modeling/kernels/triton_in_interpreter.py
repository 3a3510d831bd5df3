"""The kernel ``triton`` on a CPU: ``test_triton.py`` runs this file with Triton's interpreter."""

from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from support.stored import PQ
from support.tiny import make_model
from test_kernels import inputs_of, make_layer, matches
from torch import nn
from transformers.pytorch_utils import Conv1D
from triton.runtime.interpreter import InterpreterBuilder

from hf_quantnoise import IPQConfig, quantize_model
from hf_quantnoise.modeling.kernels import Case, kernel_for, triton_code, triton_products
from hf_quantnoise.modeling.packed import PackedLayer
from hf_quantnoise.quantizers import ProductQuantizer
from hf_quantnoise.quantizers.packing import pack_codes

PRECISION = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
OPERATION = torch.ops.hf_quantnoise.product_with_codes.default
# Some for each regime; 17 is more than a tile of 16.
COUNTS = (1, triton_code.MAX_FEW, triton_code.MAX_FEW + 1, 17)


@pytest.fixture(autouse=True)
def _dots_of_bfloat16(monkeypatch):
    """Multiply values of bfloat16: the interpreter multiplies their bits, as integers."""
    original = InterpreterBuilder.create_dot

    def values_of(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return type(handle)((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *args):
        return original(self, values_of(a), values_of(b), *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Choose kernels as on a GPU, where no weight may be decoded. Returns the kernel's calls."""
    of = Case.of
    calls = []

    def on_gpu(inputs):
        case = of(inputs)
        return Case(case.n_inputs, case.dtype, "cuda", case.is_autocast)

    def decode(*args):
        raise AssertionError("a weight was decoded")

    def write_products(inputs, *args, original=triton_code.write_products):
        calls.append(inputs.shape)
        original(inputs, *args)

    monkeypatch.setattr(Case, "of", staticmethod(on_gpu))
    monkeypatch.setattr(triton_products, "is_available", lambda: True)
    monkeypatch.setattr(PackedLayer, "decode_rows", decode)
    monkeypatch.setattr(triton_code, "write_products", write_products)
    return calls


def make_case(seed, rows, columns, size, n_centroids, n_inputs, dtype, scaled=False, bias=True):
    """Return arguments of the operation, and the weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(n_centroids, (rows, columns // size), generator=generator)
    codes[0, 0], codes[-1, -1] = 0, n_centroids - 1
    codebook, scales, own, inputs = (
        torch.randn(shape, generator=generator).to(kind)
        for shape, kind in (
            ((n_centroids, size), torch.float16),
            ((rows,), torch.float16),
            ((rows,), dtype),
            ((n_inputs, columns), dtype),
        )
    )
    weight = codebook.to(dtype)[codes].flatten(1).double()
    weight = weight * scales.double()[:, None] if scaled else weight
    bits = ProductQuantizer(size, n_centroids).code_bits
    packed = pack_codes(codes.int(), bits)
    scales, own = scales if scaled else None, own if bias else None
    return (inputs, packed, codebook, scales, own, rows, bits, dtype), weight


def assert_matches(args):
    (inputs, *_, bias, _, _, dtype), weight = args
    outputs = OPERATION(*args[0])
    assert outputs.dtype == dtype
    expected = F.linear(inputs.double(), weight, None if bias is None else bias.double())
    assert outputs.shape == expected.shape
    size = inputs.double().abs() @ weight.abs().t() + expected.abs() + 1
    assert float(((outputs.double() - expected).abs() / size).max()) < PRECISION[dtype]


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("size", triton_products.BLOCK_SIZES)
def test_products_match_float64_at_the_edges_of_tiles(size, dtype):
    for n_inputs in COUNTS:
        for rows, columns in ((1, size), (9, 528)):
            case = make_case(n_inputs, rows, columns, size, 256, n_inputs, dtype)
            assert_matches(case)
    assert_matches(make_case(0, 65, 48, size, 256, 130, dtype))  # more than the largest tile


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_number_of_bits_are_read(bits):
    number = count()
    for n_centroids in {2 ** (bits - 1) + 1, 2**bits}:  # of so many bits
        for n_inputs, rows, blocks in ((1, 7, 5), (2, 1, 9), (6, 3, 7)):
            for scaled, bias in ((True, False), (False, True)):
                case = make_case(
                    next(number), rows, 4 * blocks, 4, n_centroids, n_inputs, torch.float32,
                    scaled, bias,
                )  # fmt: skip
                assert case[0][6] == bits
                assert_matches(case)


@pytest.mark.parametrize("fields", [{}, {"codebook_bits": 32}, {"row_scale": True}], ids=str)
@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@torch.no_grad()
def test_packed_layers_run_without_decoding_for_any_strides(cls, fields, as_on_gpu, monkeypatch):
    quantizer = ProductQuantizer(4, 11, **{"codebook_bits": 16, **fields})
    layer = make_layer(quantizer, 25, 36, True, cls=cls)
    all_inputs = [inputs for n in (2, 7) for inputs in inputs_of(n, 36)]
    assert all(kernel_for(layer, Case.of(inputs)) == "triton" for inputs in all_inputs)
    outputs = [layer(inputs) for inputs in all_inputs]
    assert len(as_on_gpu) == len(all_inputs)
    monkeypatch.undo()
    for inputs, found in zip(all_inputs, outputs, strict=True):
        assert matches(layer, inputs, found, 2e-6)


@torch.no_grad()
def test_layers_of_other_dtypes_and_in_autocast(as_on_gpu, monkeypatch):
    layer = make_layer(ProductQuantizer(8, 16, 16), 25, 64, True)
    half = make_layer(ProductQuantizer(8, 16, 8), 25, 64, True).to(torch.bfloat16)
    for n_inputs in (1, 6):
        inputs = torch.randn(n_inputs, 64)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs).dtype == torch.bfloat16
            outputs = layer(inputs).float(), half(inputs.bfloat16()).float()
        with monkeypatch.context() as undone:
            undone.setattr(PackedLayer, "decode_rows", as_decoded)
            for each, found in zip((layer, half), outputs, strict=True):
                assert matches(each, inputs, found, 2**-6)


as_decoded = PackedLayer.decode_rows


@torch.no_grad()
def test_empty_inputs_and_single_vectors(as_on_gpu):
    layer = make_layer(ProductQuantizer(4, 16), 25, 32, True)
    assert layer(torch.empty(2, 0, 32)).shape == (2, 0, 25)
    inputs = torch.randn(2, 32)
    assert torch.equal(layer(inputs[0]), layer(inputs)[0])


@torch.no_grad()
def test_outputs_do_not_depend_on_the_other_inputs(as_on_gpu):
    """Up to the sums of numpy, in which the interpreter multiplies; on a GPU bits are equal."""
    layer = make_layer(ProductQuantizer(4, 16), 25, 32, True)
    inputs = torch.randn(triton_code.MAX_FEW + 4, 32)
    torch.testing.assert_close(layer(inputs)[1:], layer(inputs[1:]), rtol=0, atol=2e-6)
    torch.testing.assert_close(layer(inputs[:3])[1:], layer(inputs[1:3]), rtol=0, atol=2e-6)


@torch.no_grad()
def test_whole_model_equals_the_decoded_one(as_on_gpu, monkeypatch):
    model = quantize_model(make_model("gpt2"), IPQConfig(**PQ), progress=False).eval()
    ids = torch.randint(5, model.config.vocab_size, (2, 5))
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    packed = [layer for layer in layers if isinstance(layer, PackedLayer)]
    decode = PackedLayer.decode_rows
    monkeypatch.setattr(  # tables decode rows that are looked up
        PackedLayer,
        "decode_rows",
        lambda self, *rows: (
            as_decoded(self, *rows) if isinstance(self, nn.Embedding) else decode(self, *rows)
        ),
    )
    logits = model(ids).logits
    assert len(as_on_gpu) == len(packed) > 4
    monkeypatch.undo()
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-5)


def graphs_of(layer, *batches):
    """Compile a layer; return its graphs and its outputs."""
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    return graphs, [compiled(inputs) for inputs in batches]


def operations_of(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@torch.no_grad()
def test_compiled_layer_is_one_node_for_any_number_of_inputs(as_on_gpu):
    layer = make_layer(ProductQuantizer(4, 16, 16), 25, 32, True)
    batches = [torch.randn(n, 32) for n in (2, 9, 600)]
    graphs, outputs = graphs_of(layer, *batches)
    (found,) = graphs
    products = [name for name in operations_of(found.graph) if "hf_quantnoise" in name]
    assert products == [str(OPERATION)] and "linear" not in str(found.graph)
    for inputs, own in zip(batches, outputs, strict=True):
        assert torch.equal(own, OPERATION(*arguments(layer, inputs)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(batches[1]), outputs[1])


def arguments(layer, inputs):
    codebook = layer.weight_codebook.half()
    return inputs, layer.weight_indices, codebook, None, layer.bias, layer.rows, 4, inputs.dtype


@torch.no_grad()
def test_graphs_for_other_machines_decode(as_on_gpu, monkeypatch):
    monkeypatch.setattr(PackedLayer, "decode_rows", as_decoded)
    layer = make_layer(ProductQuantizer(4, 16), 25, 32, True)
    inputs = torch.randn(3, 32)
    exported = torch.export.export(layer, (inputs,))
    assert "product_with_codes" not in str(exported.graph)
    assert "product_with_codes" not in str(torch.jit.trace(layer, inputs).graph)
    layer.kernels = ()
    assert "product_with_codes" not in str(graphs_of(layer, inputs)[0][0].graph)


@torch.no_grad()
def test_layer_runs_in_vmap(as_on_gpu):
    layer = make_layer(ProductQuantizer(4, 16), 25, 32, True)
    inputs = torch.randn(3, 2, 32)
    torch.testing.assert_close(torch.vmap(layer)(inputs), layer(inputs))


def test_operation_is_registered_correctly():
    for n_inputs, scaled in ((1, True), (6, False)):
        args, _ = make_case(1, 9, 32, 4, 16, n_inputs, torch.float32, scaled, not scaled)
        torch.library.opcheck(OPERATION, args)


def test_errors_of_triton_say_how_to_switch_it_off(monkeypatch):
    def fail(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(triton_code, "write_products", fail)
    with pytest.raises(RuntimeError, match="no compiler") as caught:
        OPERATION(*make_case(1, 9, 32, 4, 16, 1, torch.float32)[0])
    assert caught.value.__notes__ == [triton_products.HINT]
    assert "layer.kernels = ()" in triton_products.HINT
