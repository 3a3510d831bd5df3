"""Packed layers against float64 references built from their codes and codebooks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.memory import live_bytes
from torch import nn
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from hf_quantnoise.blocks import weight_matrix
from hf_quantnoise.modeling import PackedLayer, pack_layer, packed_names
from hf_quantnoise.modeling.convert import unpack_model
from hf_quantnoise.modeling.kernels import case
from hf_quantnoise.quantizers import AdditiveQuantizer, FixedPointQuantizer, ProductQuantizer


def fill(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


LAYERS = {
    "linear": lambda: fill(nn.Linear(32, 48)),
    "linear-nobias": lambda: fill(nn.Linear(32, 48, bias=False)),
    "conv1d": lambda: fill(Conv1D(48, 32)),
    "embedding": lambda: fill(nn.Embedding(60, 32)),
    "padded": lambda: fill(nn.Embedding(60, 32, padding_idx=1)),
    "renorm": lambda: fill(nn.Embedding(60, 32, max_norm=1.0)),
}
QUANTIZERS = {
    "pq-8bit": ProductQuantizer(block_size=4, n_centroids=64),
    "pq-4bit": ProductQuantizer(block_size=8, n_centroids=16),
    "pq-5bit": ProductQuantizer(block_size=8, n_centroids=31),
    "pq-half": ProductQuantizer(block_size=4, n_centroids=16, codebook_bits=16),
    "pq-int8": ProductQuantizer(block_size=4, n_centroids=16, codebook_bits=8),
    "pq-row-scale": ProductQuantizer(block_size=8, n_centroids=31, row_scale=True),
    "pq-row-scale-int8": ProductQuantizer(4, 16, codebook_bits=8, row_scale=True),
    "additive": AdditiveQuantizer(block_size=8, n_centroids=31),
    "additive-row-scale-int8": AdditiveQuantizer(8, 16, codebook_bits=8, row_scale=True),
    "int8": FixedPointQuantizer(bits=8),
    "int5-channel": FixedPointQuantizer(bits=5, observer="channel"),
    "int3": FixedPointQuantizer(bits=3),
}


def inputs_for(layer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 60, (3, 7), generator=generator)
    return torch.randn(3, 7, 32, generator=generator)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("kind", LAYERS)
class TestEveryLayerAndQuantizer:
    def test_forward_matches_dense_layer_with_quantized_weight(self, kind, quantizer):
        layer, dense = LAYERS[kind](), LAYERS[kind]()
        matrix = weight_matrix(layer)
        state = quantizer.fit(matrix, seed=3)
        expected = quantizer.quantize(matrix, state)
        pack_layer(layer, quantizer, seed=3)
        weight_matrix(dense).copy_(expected)
        inputs = inputs_for(layer)
        torch.testing.assert_close(weight_matrix(layer), expected, rtol=0, atol=0)
        torch.testing.assert_close(layer(inputs), dense(inputs))
        with torch.no_grad():
            torch.testing.assert_close(layer(inputs), dense(inputs))

    def test_packed_layer_keeps_class_and_bias(self, kind, quantizer):
        layer = LAYERS[kind]()
        original = type(layer)
        has_bias = getattr(layer, "bias", None) is not None
        pack_layer(layer, quantizer)
        assert isinstance(layer, original) and isinstance(layer, PackedLayer)
        assert "weight" not in layer.state_dict()
        assert ("bias" in layer.state_dict()) == has_bias
        assert not layer.weight_indices.requires_grad
        assert layer.weight_indices.dtype == torch.uint8

    def test_number_of_bytes(self, kind, quantizer):
        layer = LAYERS[kind]()
        pack_layer(layer, quantizer)
        codes = layer.rows * layer.columns // quantizer.block_size
        codes *= 2 if isinstance(quantizer, AdditiveQuantizer) else 1
        assert layer.weight_indices.numel() == -(-codes * quantizer.code_bits // 8)

    def test_deepcopy_pickle_and_unpacking(self, kind, quantizer):
        layer = LAYERS[kind]()
        original = type(layer)
        pack_layer(layer, quantizer)
        inputs = inputs_for(layer)
        output = layer(inputs)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer)
            assert torch.equal(other(inputs), output)
        weight = layer.weight.detach().clone()
        unpack_model(layer)
        assert type(layer) is original
        assert next(iter(layer.state_dict())) == "weight"
        assert torch.equal(layer.weight, weight)
        torch.testing.assert_close(layer(inputs), output)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_centroid_gradient_is_average_over_blocks(kind):
    """Section 3.2: 1 / |J_c| * sum of dL/db over the blocks of c; from the dense gradient."""
    quantizer = ProductQuantizer(block_size=4, n_centroids=8)
    layer, dense = LAYERS[kind](), LAYERS[kind]()
    pack_layer(layer, quantizer)
    dense.weight.data.copy_(layer.weight.detach())
    inputs = inputs_for(layer)
    target = torch.randn(*layer(inputs).shape, generator=torch.Generator().manual_seed(2))
    ((layer(inputs) - target) ** 2).sum().backward()
    ((dense(inputs) - target) ** 2).sum().backward()
    gradient = dense.weight.grad.t() if kind == "conv1d" else dense.weight.grad
    blocks = gradient.reshape(-1, 4).double()
    codes = layer.codes().reshape(-1)
    expected = torch.stack([blocks[codes == k].mean(0) for k in range(8)])
    torch.testing.assert_close(layer.weight_codebook.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_padding_row_gives_no_gradient():
    layer = LAYERS["padded"]()
    pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=8))
    assert layer.padding_idx == 1
    layer(torch.tensor([[1, 1]])).sum().backward()
    assert layer.weight_codebook.grad.abs().sum() == 0
    layer(torch.tensor([[1, 2]])).sum().backward()
    assert layer.weight_codebook.grad.abs().sum() > 0


@pytest.mark.parametrize("columns", [32, 20])  # whose rows of codes begin on a byte, and not
def test_table_with_sparse_gradients_trains(columns):
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        layer = nn.Embedding(64, columns, sparse=sparse)
        pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=8))
        layer(torch.tensor([[1, 2]])).sum().backward()
        gradients.append(layer.weight_codebook.grad)
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)


def test_16_bit_centroids_are_used_as_stored():
    layer = LAYERS["linear"]()
    pack_layer(layer, QUANTIZERS["pq-half"])
    with torch.no_grad():
        layer.weight_codebook.add_(1e-5)  # below the spacing of float16 for most entries
    assert torch.equal(layer.weight, layer.weight.half().float())


def test_large_matrix_is_decoded_in_slices(monkeypatch):
    """A forward without gradients keeps its scratch within the bound."""
    layer = fill(nn.Linear(32, 1000))
    pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=16))
    layer.kernels = ()
    inputs = inputs_for(layer)
    expected = F.linear(inputs, layer.weight, layer.bias)
    monkeypatch.setattr(case, "SCRATCH_BYTES", 64 * 32 * 4)
    monkeypatch.setattr(case, "PART_FOR_FEW", 1)
    decoded = []
    original = PackedLayer.decode_rows
    monkeypatch.setattr(
        PackedLayer,
        "decode_rows",
        lambda self, rows=None: decoded.append(rows) or original(self, rows),
    )
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), expected)
    assert len(decoded) == 16
    assert all(rows.stop - rows.start <= 64 for rows in decoded)


def test_table_decodes_only_looked_up_rows(monkeypatch):
    layer = LAYERS["embedding"]()
    pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=16))
    seen = []
    original = ProductQuantizer.decode
    monkeypatch.setattr(
        ProductQuantizer,
        "decode",
        lambda self, codes, state: seen.append(len(codes)) or original(self, codes, state),
    )
    layer(torch.tensor([[4, 5, 4]]))
    assert seen == [3]


@pytest.mark.parametrize("row", [-1, 60])
def test_row_out_of_range_raises(row):
    layer = LAYERS["embedding"]()
    pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=16))
    assert layer.rows_are_aligned
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor([[4, row]]))


def test_subclass_keeps_its_behaviour():
    layer = fill(OPTLearnedPositionalEmbedding(62, 32))  # adds 2 to every position
    pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=16))
    mask = torch.ones(1, 5, dtype=torch.long)
    torch.testing.assert_close(layer(mask)[0], layer.weight[2:7])


def test_tied_layers_share_tensors():
    table, head = nn.Embedding(60, 32), nn.Linear(32, 60, bias=False)
    head.weight = table.weight
    pack_layer([table, head], ProductQuantizer(block_size=4, n_centroids=16))
    for name in packed_names(table):
        assert getattr(table, name) is getattr(head, name)
    unpack_model(nn.ModuleList([table, head]))
    assert table.weight is head.weight


def test_new_codes_reset_block_counts():
    layer = LAYERS["linear"]()
    pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=16))
    before = layer.block_counts()
    layer.weight_indices = nn.Parameter(torch.zeros_like(layer.weight_indices), False)
    assert layer.block_counts().tolist() != before.tolist()
    assert layer.block_counts()[0] == layer.n_codes


def test_pack_layer_with_unsuitable_quantizer_raises():
    with pytest.raises(ValueError, match="cannot be stored"):
        pack_layer(nn.Linear(30, 64), ProductQuantizer(block_size=4, n_centroids=16))


def test_relative_error_matches_float64_reference():
    layer = LAYERS["linear"]()
    original = layer.weight.detach().double().clone()
    error = pack_layer(layer, ProductQuantizer(block_size=4, n_centroids=16))
    reference = (original - layer.weight.double()).square().sum() / original.square().sum()
    assert error == pytest.approx(reference.item(), rel=1e-5)
    zero = nn.Linear(32, 64)
    nn.init.zeros_(zero.weight)
    assert pack_layer(zero, FixedPointQuantizer(bits=8)) == 0.0


@pytest.mark.parametrize(
    "quantizer",
    [ProductQuantizer(8, 256, n_iter=1), FixedPointQuantizer(8), FixedPointQuantizer(4, "channel")],
    ids=str,
)
def test_packing_needs_less_memory_than_a_second_weight(quantizer):
    torch.manual_seed(0)
    table = nn.Embedding(40_000, 256)
    weight = table.weight.detach()
    found = live_bytes(lambda: pack_layer(table, quantizer))
    assert found.peak < 0.8 * weight.nbytes
    decoded = table.weight.detach()
    exact = (decoded - weight).double().square().sum() / weight.double().square().sum()
    assert found.result == pytest.approx(float(exact), rel=1e-4)
