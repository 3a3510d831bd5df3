"""``weight`` of a packed layer is decoded for its values, not for its attributes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from modeling.test_packed import LAYERS, QUANTIZERS
from support.memory import live_bytes
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_quantnoise import FixedPointConfig, IPQConfig, optimize_for_inference, quantize_model
from hf_quantnoise.compat import DisableTorchFunction
from hf_quantnoise.modeling import PackedLayer, pack_layer, packed_layers
from hf_quantnoise.quantizers import FixedPointQuantizer, ProductQuantizer

IDS = torch.arange(5, 13).view(2, 4)
T5_SIZES = {
    "vocab_size": 300, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def gemma():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
             "num_key_value_heads": 1, "intermediate_size": 64}  # fmt: skip
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=300, **sizes))


MODELS = {
    "gemma": (gemma, {"input_ids": IDS}),
    "t5": (
        lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES)),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
    "mt5": (
        lambda: MT5ForConditionalGeneration(MT5Config(**T5_SIZES)),
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
}


@pytest.fixture
def decoded(monkeypatch):
    """The layers whose complete weight is decoded, in order."""
    layers, original = [], PackedLayer.decode
    monkeypatch.setattr(
        PackedLayer, "decode", lambda layer: layers.append(layer) or original(layer)
    )
    return layers


@pytest.mark.parametrize("config", [IPQConfig(block_size=4, n_centroids=16), FixedPointConfig()])
@pytest.mark.parametrize("name", MODELS)
def test_forward_decodes_no_weight_for_its_dtype(name, config, decoded):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = quantize_model(make().eval(), config, progress=False)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert not decoded
        dense = copy.deepcopy(model).dequantize()
        torch.testing.assert_close(logits, dense(**inputs).logits, rtol=0, atol=1e-4)
        decoded.clear()
        optimize_for_inference(copy.deepcopy(model), "float32")(**inputs)
        assert not decoded
    model(**inputs).logits.sum().backward()  # with gradients, each Linear once
    linear = [layer for _, layer in packed_layers(model) if isinstance(layer, nn.Linear)]
    assert sorted(map(id, decoded)) == sorted(map(id, linear))


def test_reading_attributes_takes_no_memory():
    table = nn.Embedding(20_000, 64)
    pack_layer(table, FixedPointQuantizer(bits=8))
    found = live_bytes(lambda: (table.weight.dtype, table.weight.detach().shape))
    assert found.peak < 10_000 and found.result == (torch.float32, (20_000, 64))


ATTRIBUTES = {
    "dtype": lambda weight: weight.dtype,
    "device": lambda weight: (weight.device, weight.is_meta, weight.is_cuda, weight.get_device()),
    "shape": lambda weight: (weight.shape, weight.size(), weight.size(0), len(weight)),
    "number": lambda weight: (weight.numel(), weight.dim(), weight.ndim, weight.nbytes),
    "kind": lambda weight: (weight.is_floating_point(), torch.is_floating_point(weight)),
    "class": lambda weight: (isinstance(weight, torch.Tensor), isinstance(weight, nn.Parameter)),
    "requires_grad": lambda weight: weight.requires_grad,
    "data": lambda weight: (weight.data.dtype, weight.detach().shape, weight.data.requires_grad),
    "layout": lambda weight: (weight.layout, weight.is_sparse),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attributes_are_those_of_the_decoded_weight(kind, quantizer, dtype, decoded):
    layer = LAYERS[kind]().to(dtype)
    pack_layer(layer, quantizer)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = layer.decode()
            decoded.clear()
            found = {name: read(layer.weight) for name, read in ATTRIBUTES.items()}
            assert not decoded
            assert found == {name: read(expected) for name, read in ATTRIBUTES.items()}
            assert torch.equal(layer.weight, expected)
            assert layer.weight.stride() == expected.stride()
            assert layer.weight.is_leaf == expected.is_leaf


@pytest.fixture
def layer():
    layer = LAYERS["linear"]()
    pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=16))
    return layer


OPERATIONS = {
    "linear": lambda weight, other: F.linear(other, weight),
    "in a list": lambda weight, other: torch.cat([weight, weight]),
    "of another": lambda weight, other: torch.add(other[0], other=weight),
    "index": lambda weight, other: weight[3:5, None],
    "view": lambda weight, other: weight.T.reshape(-1),
    "convert": lambda weight, other: weight.to(torch.float64),
    "two": lambda weight, other: weight @ weight.mT,
    "loss": lambda weight, other: F.mse_loss(weight, torch.zeros_like(weight)),
    "einsum": lambda weight, other: torch.einsum("oi,bi->bo", weight, other),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_and_their_gradients_are_exact(name, layer, decoded):
    other, results = torch.ones(3, 32), []
    for weight in (layer.weight, layer.decode()):
        result = OPERATIONS[name](weight, other)
        (gradient,) = torch.autograd.grad(result.sum(), [layer.weight_codebook])
        results.append((result, gradient))
    assert all(map(torch.equal, *results)) and len(decoded) == 2


def test_values_are_computed_in_the_mode_of_the_read(layer):
    with torch.no_grad():
        weight = layer.weight
    assert not weight.requires_grad and not (weight + 0).requires_grad
    weight = layer.weight
    with torch.no_grad():
        expected = weight.sum()
    assert weight.requires_grad and (weight + 0).requires_grad and weight.sum() == expected
    with torch.inference_mode():
        weight = layer.weight
    assert weight.is_inference()
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    layer.weight.requires_grad = True
    assert layer.weight_codebook.requires_grad


def test_copies_and_files_hold_values(layer):
    expected = layer.decode().detach()
    weight = layer.weight.detach()
    for made in (
        pickle.loads(pickle.dumps(weight)),
        torch.from_numpy(weight.numpy()),
        nn.Parameter(layer.weight),
        weight.clone(),
        torch.tensor(weight.tolist()),
    ):
        assert torch.equal(made, expected)
    assert repr(weight).startswith("ReadOnlyWeight([[")
    with pytest.raises(ValueError, match="cannot be written to"):
        nn.Parameter(layer.weight).data.add_(1)


class ReadsItself(nn.Module):
    """Reads an attribute and the values of a weight."""

    def __init__(self, layer, between=lambda: None):
        super().__init__()
        self.layer, self.between = layer, between

    def forward(self, inputs):
        weight = self.layer.weight
        self.between()
        return F.linear(inputs.to(weight.dtype), weight) / weight.shape[0]


def test_graphs_have_the_decoded_weight(layer):
    model, inputs = ReadsItself(layer), torch.randn(2, 32)
    expected = model(inputs)
    with torch.no_grad():
        graphs = (
            torch.jit.trace(model, (inputs,)),
            torch.export.export(model, (inputs,)).module(),
            torch.compile(model, backend="aot_eager", fullgraph=True),
            torch.vmap(model),
        )
        for graph in graphs:
            torch.testing.assert_close(graph(inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_weight_passes_a_graph_break(backend, layer):
    torch._dynamo.reset()
    model, inputs = ReadsItself(layer, torch._dynamo.graph_break), torch.randn(2, 32)
    compiled = torch.compile(model, backend=backend)
    assert torch.equal(compiled(inputs), ReadsItself(layer)(inputs))


def test_gradients_are_not_lost_without_torch_functions(layer):
    with DisableTorchFunction():
        assert layer.weight.shape == (48, 32)
        with pytest.raises(RuntimeError, match=r"cannot compute gradients.*layer.decode"):
            layer.weight.sum()
        with torch.no_grad():
            assert torch.equal(layer.weight.sum(), layer.decode().sum())
