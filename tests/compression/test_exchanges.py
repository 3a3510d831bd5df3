"""Exchanges of codewords: the best there are, of all weights, put there and back."""

import copy
import math

import pytest
import torch
from support.packed_linears import QUANTIZERS, normal, packed_linear
from support.tiny import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_quantnoise import IPQConfig, quantize_model
from hf_quantnoise.compression import exchanges
from hf_quantnoise.compression.exchanges import (
    _best_codes,
    _best_of_rows,
    promising,
)
from hf_quantnoise.quantizers import ProductQuantizer
from hf_quantnoise.quantizers.kmeans import MAX_BYTES


def best_exchanges(layer, gradient):
    """By brute force in float64: for each row the best (ratio, place of the code, new code)."""
    quantizer = layer.quantizer
    state = {key: value.detach().double() for key, value in layer.state.items()}
    size, m, k = quantizer.block_size, quantizer.codes_per_block, quantizer.n_centroids
    found = []
    for row, old in enumerate(layer.codes().long()):
        best = (-torch.inf, 0, 0)
        own = quantizer.state_of_rows(state, torch.tensor([row]))
        here = quantizer.decode(old[None], own)[0]
        for place in range(len(old)):
            at = slice(place // m * size, (place // m + 1) * size)
            new = old.repeat(k, 1)
            new[:, place] = torch.arange(k)
            every = {key: v.expand(k, 1) if key == "row_scale" else v for key, v in own.items()}
            step = quantizer.decode(new, every)[:, at] - here[at]
            lengths = step.square().sum(1)
            ratios = -(step @ gradient[row, at].double()) / lengths
            ratios[lengths == 0] = -torch.inf
            best = max(best, (float(ratios.max()), place, int(ratios.argmax())))
        found.append(best)
    return found


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_exchange_of_each_row_is_the_best_there_is(name):
    layer, gradient = packed_linear(QUANTIZERS[name], rows=6, columns=256), normal(6, 256, seed=3)
    before, expected = layer.codes().clone(), best_exchanges(layer, gradient)
    counts = layer.block_counts().clone()
    found = promising([([layer], gradient)], 1.0)
    assert torch.equal(layer.codes(), before)  # nothing is made yet
    assert len(found) == 6  # one of a row at most
    found.put(found.codes)
    for row, (_, place, code) in enumerate(expected):
        changed = layer.codes()[row] != before[row]
        assert changed.nonzero()[:, 0].tolist() == [place]
        assert int(layer.codes()[row, place]) == code
    assert not torch.equal(counts, layer.block_counts())  # what gradients are averaged by


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return result


@pytest.mark.parametrize(("k", "blocks"), [(256, 1300), (1024, 1300), (8192, 200)])
def test_the_code_of_each_block_is_the_best_in_float64(k, blocks):
    """Of more blocks than a chunk has."""
    book, slopes = normal(k, 4), normal(blocks, 4, seed=1)
    codes = torch.randint(k, (blocks,), generator=torch.Generator().manual_seed(2))
    book[codes[0]] = book[codes[0] - 1]  # its equal is no exchange
    found, new = _best_codes(book, None, codes, slopes)
    steps = book.double() - book.double()[codes, None]
    lengths = steps.square().sum(2)
    ratios = -torch.einsum("nks,ns->nk", steps, slopes.double()) / lengths
    ratios.masked_fill_(lengths == 0, 0.0)
    expected = ratios.max(1).values
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    chosen = ratios.gather(1, new[:, None])[:, 0]
    torch.testing.assert_close(chosen, expected, rtol=1e-3, atol=1e-3)


def test_no_tensor_is_larger_than_the_bound(monkeypatch):
    """Neither K by K nor a row's places by K stands in memory, and what is found is the same."""
    layer = packed_linear(ProductQuantizer(4, 2048, n_iter=1), rows=4, columns=4096)
    gradient = normal(4, 4096, seed=3)
    with Largest() as largest:
        ratios, places, codes = _best_of_rows(layer, gradient)
    assert largest.bytes <= MAX_BYTES
    monkeypatch.setattr(exchanges, "chunk_rows", lambda k: 10**6)
    monkeypatch.setattr(exchanges, "MAX_BYTES", 2**40)
    with Largest() as largest:
        at_once = _best_of_rows(layer, gradient)
    assert largest.bytes > 4 * MAX_BYTES
    torch.testing.assert_close(ratios, at_once[0])
    assert torch.equal(places, at_once[1]) and torch.equal(codes, at_once[2])


@pytest.mark.parametrize("share", [1e-6, 0.002, 0.008])
def test_the_best_of_all_weights_are_proposed_within_the_share(share):
    """The weights of a model compete: one whose gradients are small moves nothing."""
    layers = [packed_linear(QUANTIZERS[name]) for name in ("pq", "additive", "pq")]
    gradients = [normal(64, 64, seed=3), normal(64, 64, seed=4), 1e-3 * normal(64, 64, seed=5)]
    before = [layer.weight.detach().clone() for layer in layers]
    ratios = torch.tensor(
        [
            [best[0] for best in best_exchanges(*pair)]
            for pair in zip(layers, gradients, strict=True)
        ]
    )
    pairs = [([layer], gradient) for layer, gradient in zip(layers, gradients, strict=True)]
    found = promising(pairs, share)
    assert found.blocks == 1024 + 512 + 1024
    assert len(found) == math.ceil(share * found.blocks)
    for count in {1, (len(found) + 1) // 2, len(found)}:  # the most promising first
        had = found.put(found.codes[:count])
        steps = [layer.weight.detach() - old for layer, old in zip(layers, before, strict=True)]
        moved = torch.stack([step.abs().sum(1) > 0 for step in steps])
        assert moved.sum() == count and not moved[2].any()
        assert ratios[moved].min() > ratios[~moved].max()
        for step, gradient, rows in zip(steps, gradients, moved, strict=True):
            assert ((step * gradient).sum(1)[rows] < 0).all()  # the linearised loss falls
        found.put(had)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_put_back_every_bit_is_as_it_was(name):
    layers = [packed_linear(QUANTIZERS[name]), packed_linear(QUANTIZERS[name], rows=32)]
    pairs = [([layer], normal(layer.rows, 64, seed=3)) for layer in layers]
    found = promising(pairs, 0.02)

    def bits():
        return [
            x.clone() for layer in layers
            for x in (layer.weight_indices, layer.weight.detach(), layer.block_counts())
        ]  # fmt: skip

    before = bits()
    had = found.put(found.codes[:9])
    assert not any(torch.equal(*pair) for pair in zip(before[:3], bits()[:3], strict=True))
    assert torch.equal(found.put(had), found.codes[:9])
    assert all(torch.equal(*pair) for pair in zip(before, bits(), strict=True))


def test_layers_of_one_weight_move_together(input_ids):
    model = quantize_model(make_model("gpt2"), IPQConfig(n_centroids=16), progress=False)
    layers, before = [model.transformer.wte, model.lm_head], copy.deepcopy(model)
    total = normal(layers[0].rows, layers[0].columns, seed=3)
    found = promising([(layers, total)], 0.01)
    counts = [layer.block_counts().clone() for layer in layers]
    had = found.put(found.codes)
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    for layer, old in zip(layers, counts, strict=True):
        assert not torch.equal(layer.block_counts(), old)
    found.put(had)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, before(input_ids).logits)


def test_gradients_that_say_nothing_propose_nothing():
    layer = packed_linear(ProductQuantizer(4, 32))
    for gradient in (torch.zeros(64, 64), torch.full((64, 64), torch.nan)):
        assert len(promising([([layer], gradient)], 1.0)) == 0


def test_equal_centroids_are_no_exchange():
    layer = packed_linear(ProductQuantizer(4, 32))
    with torch.no_grad():
        layer.weight_codebook[:] = layer.weight_codebook[0]
    assert len(promising([([layer], normal(64, 64, seed=3))], 1.0)) == 0
