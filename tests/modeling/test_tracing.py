"""torch.jit.trace, torch.export, torch.fx and torch.func on packed models."""

import io

import pytest
import torch
from support.stacked import inputs_of
from support.stored import PQ, STORED
from support.tiny import make_model

from hf_quantnoise import IPQConfig, quantize_model

KINDS = {
    **STORED,
    "additive": IPQConfig(block_size=8, n_centroids=16, n_codebooks=2, row_scale=True),
    "inputs": IPQConfig(**PQ, activation_bits=8),
}
IDS = inputs_of("bert")["input_ids"]
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    model = quantize_model(
        make_model("bert"), KINDS[request.param], calibration_data=[inputs_of("bert")],
        progress=False,
    )  # fmt: skip
    model.config.return_dict = False  # jit returns no dicts
    return model


@pytest.fixture(scope="module")
def layer(model):
    return model.bert.encoder.layer[0].output.dense


@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace_passes_its_check_and_saves(grad, model):
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (IDS, MASK))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for ids in (IDS, IDS[:1, :4]):
        mask = torch.ones_like(ids)
        with torch.no_grad():
            expected = model(ids, mask)[0]
        for each in (traced, loaded):
            torch.testing.assert_close(each(ids, mask)[0], expected, rtol=0, atol=1e-5)


def test_export_and_functional_call_equal_the_model(model):
    with torch.no_grad():
        expected = model(IDS, MASK)[0]
        program = torch.export.export(model, (IDS, MASK))
        torch.testing.assert_close(program.module()(IDS, MASK)[0], expected, rtol=0, atol=1e-5)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert torch.equal(torch.func.functional_call(model, state, (IDS, MASK))[0], expected)


def test_layer_runs_in_vmap_and_as_leaf_of_fx(layer):
    inputs = torch.randn(3, 2, layer.columns)
    with torch.no_grad():
        expected = layer(inputs)
        torch.testing.assert_close(torch.vmap(layer)(inputs), expected, rtol=0, atol=1e-5)
        graph = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
        torch.testing.assert_close(graph(inputs), expected, rtol=0, atol=1e-5)
