"""The kernel ``triton`` on a GPU, against float64: dtypes, compiled, in CUDA graphs."""

import pytest
import torch
from test_kernels import inputs_of, make_layer, matches

from hf_quantnoise.modeling.kernels import Case, kernel_for, triton_products
from hf_quantnoise.quantizers import ProductQuantizer

pytestmark = pytest.mark.skipif(
    not triton_products.is_available(), reason="no CUDA GPU with Triton and a C compiler"
)
PRECISION = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
COUNTS = (1, 4, 5, 16, 33, 64)
SHAPES = [(1, 16, True), (250, 48, False), (400, 1040, True)]  # rows, columns, bias


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def make_pair(quantizer, dtype, shape=(400, 1040, True)):
    """Return a layer on the GPU, and the same on the CPU in float32."""
    layer = make_layer(quantizer, *shape)
    return make_layer(quantizer, *shape).to("cuda", dtype), layer


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("size", triton_products.BLOCK_SIZES)
def test_products_match_float64(size, dtype):
    for n_centroids, scaled in ((16, False), (11, True), (5, False)):
        for shape in SHAPES:
            if shape[0] * shape[1] // size <= n_centroids:
                continue
            quantizer = ProductQuantizer(size, n_centroids, row_scale=scaled)
            gpu, cpu = make_pair(quantizer, dtype, shape)
            for count in COUNTS:
                for inputs in inputs_of(count, shape[1]):
                    own = inputs.to("cuda", dtype)
                    assert kernel_for(gpu, Case.of(own)) == "triton"
                    assert matches(cpu, own.float().cpu(), gpu(own).float().cpu(), PRECISION[dtype])


def test_equal_inputs_give_equal_bits_in_any_batch_of_a_regime():
    layer, _ = make_pair(ProductQuantizer(4, 16), torch.float32, (25, 32, True))
    inputs = torch.randn(40, 32, device="cuda")
    for count in (3, 40):  # few inputs, and many
        assert torch.equal(layer(inputs[:count])[1:], layer(inputs[1:count]))


def test_autocast_and_tf32():
    gpu, cpu = make_pair(ProductQuantizer(8, 256, 16), torch.float32)
    for count in COUNTS:
        inputs = torch.randn(count, 1040)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = gpu(inputs.cuda())
        assert outputs.dtype == torch.bfloat16
        assert matches(cpu, inputs, outputs.float().cpu(), PRECISION[torch.bfloat16])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert matches(cpu, inputs, gpu(inputs.cuda()).cpu(), 2**-9)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_layers_equal_eager_ones(mode):
    gpu, cpu = make_pair(ProductQuantizer(4, 256, 16), torch.bfloat16)
    compiled = torch.compile(gpu, mode=mode, fullgraph=True)
    for count in (1, 7, 700):  # eager products of 700 inputs decode
        inputs = torch.randn(count, 1040).bfloat16()
        for _ in range(4):  # a CUDA graph is recorded and replayed
            outputs = compiled(inputs.cuda()).clone()
            assert matches(cpu, inputs.float(), outputs.float().cpu(), PRECISION[torch.bfloat16])


def test_cuda_graphs_replay_with_other_inputs():
    gpu, cpu = make_pair(ProductQuantizer(8, 256, 16), torch.float16)
    inputs = torch.zeros(2, 1040, dtype=torch.float16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gpu(inputs)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = gpu(inputs)
    own = torch.randn(2, 1040).half()
    inputs.copy_(own)
    graph.replay()
    assert matches(cpu, own.float(), outputs.float().cpu(), PRECISION[torch.float16])


def test_no_decoded_weight_is_allocated():
    rows, columns = 8192, 4096
    gpu, _ = make_pair(
        ProductQuantizer(16, 256, 16, n_iter=1), torch.bfloat16, (rows, columns, False)
    )
    for count in (1, 512):
        inputs = torch.randn(count, columns, dtype=torch.bfloat16, device="cuda")
        gpu(inputs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gpu(inputs)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < 2 * count * rows * 2 + 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_gpu_than_the_current_one():
    gpu, cpu = make_pair(ProductQuantizer(8, 256, 16), torch.float32)
    gpu.to("cuda:1")
    inputs = torch.randn(3, 1040)
    assert matches(cpu, inputs, gpu(inputs.to("cuda:1")).cpu(), PRECISION[torch.float32])
    with pytest.raises(ValueError, match="invalid device of inputs"):
        gpu(inputs.to("cuda:0"))
