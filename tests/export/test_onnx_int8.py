"""The int8 form of an ONNX export, checked layer by layer against products in float64."""

import numpy as np
import pytest
import torch
from support.onnx_exports import inputs_of, session_of
from support.tiny import SIZES, VOCABULARY, make_vision_model
from transformers import BertConfig, BertForSequenceClassification

from hf_quantnoise import FixedPointConfig, IPQConfig, export_onnx, quantize_model
from hf_quantnoise.export import onnx_file
from hf_quantnoise.export.onnx_graph import store_as_float16
from hf_quantnoise.modeling import packed_layers

LAYER = "bert.encoder.layer.0."
PQ = {"scheme": "pq", "block_size": 4, "n_centroids": 256, "codebook_bits": 8}
CONFIG = {
    "block_size": 4,
    "n_centroids": 16,
    "codebook_bits": 8,
    "layer_quantizers": {
        f"{LAYER}attention.self.query": PQ | {"row_scale": True, "n_centroids": 16},
        f"{LAYER}attention.self.key": PQ | {"codebook_bits": 16, "n_centroids": 16},
        f"{LAYER}intermediate.dense": {"scheme": "int", "bits": 8, "observer": "channel"},
        f"{LAYER}attention.output.dense": {"scheme": "int", "bits": 3},
        f"{LAYER}output.dense": {"scheme": "additive", "block_size": 4, "n_centroids": 16},
    },
}
ROUNDED, ADDITIVE = f"{LAYER}attention.self.key", f"{LAYER}output.dense"


@pytest.fixture(autouse=True)
def _extra():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs the extra 'onnx'")


def packed(**options):
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "num_hidden_layers": 1, "initializer_range": 0.2})
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(5, VOCABULARY, (4, 9))
    config = IPQConfig(**CONFIG, **options)
    return quantize_model(model, config, calibration_data=[{"input_ids": ids}], progress=False)


def products_of(graph):
    """Return the inputs and outputs of int8 products, by name of their layer."""
    producers = {output: node for node in graph.node for output in node.output}
    users = {name: node for node in graph.node for name in node.input}

    def codes_of(name):
        if name.endswith(".weight_indices"):
            return name
        found = [codes_of(each) for each in getattr(producers.get(name), "input", ())]
        return next(filter(None, found), "")

    products = {}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            layer = codes_of(node.input[1]).removeprefix("model.").removesuffix(".weight_indices")
            output = node.output[0]
            for expected in ("Cast", "Mul", "Add"):
                output, operator = users[output].output[0], users[output].op_type
                assert operator == expected
            products[layer] = node.input[0], output
    return products, producers


def rounded(inputs, layer):
    """Return inputs rounded to 8 bits in float64, by their range or a saved one."""
    if layer.activation_bits:
        scale, zero = (getattr(layer, f"input_{k}").item() for k in ("scale", "zero_point"))
    else:
        low, high = min(inputs.min(), 0.0), max(inputs.max(), 0.0)
        scale = (high - low) / 255
        zero = np.round(-low / scale)
    levels = np.clip(np.round(inputs / scale + zero), 0, 255)
    assert np.abs((levels - zero) * scale - inputs).max() < 1.01 * scale or layer.activation_bits
    return (levels - zero) * scale, scale


@pytest.mark.parametrize(
    "bits", [None, pytest.param(8, marks=pytest.mark.slow)], ids=["in each call", "saved"]
)
def test_int8_products_are_those_of_rounded_inputs(tmp_path, bits):
    import onnx

    model = packed(activation_bits=bits)
    result = export_onnx(model, tmp_path, dtype="int8")
    assert result.file == tmp_path / "onnx" / "model_int8.onnx"
    assert '"dtype": "int8"' in (tmp_path / "config.json").read_text()
    assert list(result.not_int8) == [ADDITIVE]

    program = onnx.load(str(result.file))
    products, producers = products_of(program.graph)
    names = {name for name, _ in packed_layers(model)}
    tables = {name for name in names if "embeddings" in name}
    assert products.keys() == names - tables - {ADDITIVE}
    known = {value.name for value in program.graph.output}
    # The float inputs, before they are rounded.
    floats = {}
    for layer, (integers, output) in products.items():
        node = producers[integers]
        while node.op_type not in ("DynamicQuantizeLinear", "Div"):
            node = producers[node.input[0]]
        has_saved_range = model.get_submodule(layer).activation_bits is not None
        assert (node.op_type == "Div") == has_saved_range
        floats[layer] = node.input[0], output
    saved = sum(model.get_submodule(layer).activation_bits is not None for layer in floats)
    assert (saved > 0) == (bits is not None)
    names = {name for pair in floats.values() for name in pair} - known
    program.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in sorted(names))
    session = session_of(program.SerializeToString())
    inputs = inputs_of(session, VOCABULARY)
    inputs["attention_mask"][:] = 1
    wanted = [name for pair in floats.values() for name in pair]
    values = session.run(wanted, {name: tensor.numpy() for name, tensor in inputs.items()})
    for name, before, found in zip(floats, values[::2], values[1::2], strict=True):
        layer = model.get_submodule(name)
        weight = layer.weight.detach().double().numpy()
        exact, scale = rounded(before.astype(np.float64), layer)
        expected = exact @ weight.T + layer.bias.detach().double().numpy()
        # An input halfway between two levels may be rounded to either in float32.
        tolerance = 1e-5 * np.abs(exact).max() * np.abs(weight).sum(1).max()
        if name == ROUNDED:  # to 255 steps of its codebook
            step = np.ptp(layer.weight_codebook.detach().double().numpy()) / 255
            tolerance += step * np.abs(exact).sum(-1).max() / 2
        off = np.abs(found - expected) > tolerance
        assert off.mean() < 0.05, (name, np.abs(found - expected).max(), tolerance)
        assert (np.abs(found - expected) < tolerance + scale * np.abs(weight).max() * 2).all()
        assert np.abs(expected).std() > 10 * tolerance or name == ROUNDED


def round_inputs(layer, arguments):
    """Round the inputs of a layer to 8 bits by their range; a pre-hook."""
    values, _ = rounded(arguments[0].double().numpy(), layer)
    return (torch.from_numpy(values).float(),)


@pytest.mark.parametrize("observer", ["minmax", "channel"])
@pytest.mark.parametrize("bits", [None, 8], ids=["in each call", "saved"])
@torch.no_grad()
def test_int8_form_keeps_trained_zero_points(bits, observer, tmp_path):
    """They are between two integers, and may round to either."""

    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "num_hidden_layers": 1, "initializer_range": 0.2})
    model = BertForSequenceClassification(config).eval()
    data = [{"input_ids": torch.randint(5, VOCABULARY, (4, 9))}]
    config = FixedPointConfig(bits=4, observer=observer, activation_bits=bits)
    quantize_model(model, config, calibration_data=data if bits else None, progress=False)
    for _, layer in packed_layers(model):
        # minmax: towards 0 from an integer, as little as an optimizer's first steps move it.
        step = torch.rand_like(layer.weight_zero_point) - 0.5 if observer == "channel" else -0.01
        layer.weight_zero_point += step
    result = export_onnx(model, tmp_path, dtype="int8")
    assert result.not_int8 == {}
    session = session_of(result)
    inputs = inputs_of(session, VOCABULARY)
    inputs["attention_mask"][:] = 1
    (found,) = session.run(["logits"], {name: each.numpy() for name, each in inputs.items()})
    for _, layer in packed_layers(model):
        if bits is None and not isinstance(layer, torch.nn.Embedding):
            layer.register_forward_pre_hook(round_inputs)
    expected = model(**inputs).logits.numpy()
    # An input halfway between two levels may be rounded to either in float32.
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_int8_form_leaves_layers_with_averaged_input_ranges(tmp_path):
    model = packed(activation_bits=8)
    layer = model.bert.encoder.layer[0].intermediate.dense
    layer.input_zero_point += 0.3
    result = export_onnx(model, tmp_path, dtype="int8")
    assert result.not_int8.keys() == {ADDITIVE, f"{LAYER}intermediate.dense"}
    assert "not an integer" in result.not_int8[f"{LAYER}intermediate.dense"]


def test_int8_form_needs_a_linear_layer(tmp_path):
    config = IPQConfig(block_size=4, n_centroids=8, stages=["conv"], leftover_bits=32)
    model = quantize_model(make_vision_model("mobilenet-v1"), config, progress=False)
    with pytest.raises(ValueError, match="invalid dtype 'int8': no layer of MobileNetV1"):
        export_onnx(model, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("round_matrices", [False, True])
def test_store_as_float16_keeps_the_outputs(round_matrices):
    import onnx_ir as ir
    import onnxruntime

    generator = np.random.default_rng(0)
    inexact = generator.normal(size=(16, 16)).astype(np.float32)
    tensors = {
        "exact": inexact.astype(np.float16).astype(np.float32), "inexact": inexact,
        "large": 1e30 * inexact, "layer.weight_codebook": inexact + 1,
    }  # fmt: skip
    values = [
        ir.Value(name=name, shape=ir.Shape(t.shape), type=ir.TensorType(ir.DataType.FLOAT),
                 const_value=ir.tensor(t))
        for name, t in tensors.items()
    ]  # fmt: skip
    nodes = [ir.node("Identity", [value]) for value in values]
    outputs = [node.outputs[0] for node in nodes]
    for value, name in zip(outputs, tensors, strict=True):
        value.name, value.type, value.shape = f"{name} out", values[0].type, values[0].shape
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 18})
    program = ir.Model(graph, ir_version=10)
    store_as_float16(program, round_matrices)
    halves = {"exact", *(["inexact"] if round_matrices else [])}
    assert graph.initializers.keys() == {
        f"{name}.float16" if name in halves else name for name in tensors
    }
    session = onnxruntime.InferenceSession(ir.to_proto(program).SerializeToString())
    for found, (name, expected) in zip(session.run(None, {}), tensors.items(), strict=True):
        half = expected.astype(np.float16).astype(np.float32) if name in halves else expected
        np.testing.assert_array_equal(found, half)


def test_machine_whose_products_may_saturate_is_warned(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(onnx_file, "has_saturating_int8_products", lambda: True)
    monkeypatch.setattr(onnx_file, "_traced", lambda *args: pytest.fail("exported"))
    with pytest.raises(pytest.fail.Exception, match="exported"):
        export_onnx(packed(), tmp_path, dtype="int8")
    assert '"session.x64quantprecision" = "1"' in caplog.text
