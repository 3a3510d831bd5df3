"""Models with weights that were decoded once: values, what is saved, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.files import digest
from support.tiny import make_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import (
    AutoQuantizedModel,
    FixedPointConfig,
    IPQConfig,
    export_aqlm,
    optimize_for_inference,
    quantize_model,
    restore_packed,
)
from hf_quantnoise.blocks import weight_matrix
from hf_quantnoise.modeling import inference, pack_layer, packed_layers
from hf_quantnoise.modeling.kernels import int8
from hf_quantnoise.modeling.kernels.dense import FORMS
from hf_quantnoise.quantizers import AdditiveQuantizer, FixedPointQuantizer, ProductQuantizer
from hf_quantnoise.quantizers.fixed_point import round_activations

SUPPORTED = [
    pytest.param(form, marks=pytest.mark.skipif(not int8.is_available(), reason="no VNNI"))
    if form == "int8"
    else form
    for form in FORMS
]
# Errors relative to the sum of absolute products: rounding of float32, of bfloat16, and of weights
# and inputs to 8 bits.
PRECISION = {"float32": 1e-6, "bf16": 2**-7, "int8": 2 / 127}
IDS = torch.arange(5, 29).view(2, 12)


def packed(name="bert", config=None, **kwargs):
    model = make_model(name)
    quantize_model(model, config or IPQConfig(n_centroids=16, kmeans_iter=2), **kwargs)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", SUPPORTED)
@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@pytest.mark.parametrize(
    "quantizer",
    [ProductQuantizer(4, 16), AdditiveQuantizer(8, 16, row_scale=True), FixedPointQuantizer(4)],
    ids=["pq", "additive", "int4"],
)
@torch.no_grad()
def test_products_match_float64(form, cls, quantizer):
    torch.manual_seed(0)
    layer = nn.Linear(48, 80) if cls is nn.Linear else Conv1D(80, 48)
    layer.bias.normal_()
    pack_layer(layer, quantizer)
    model = nn.Sequential(layer)
    matrix = weight_matrix(layer).double()
    optimize_for_inference(model, form)
    for shape in ((1, 48), (3, 7, 48), (600, 48), (48,)):
        inputs = torch.randn(shape)
        expected = F.linear(inputs.double(), matrix, layer.bias.double())
        size = inputs.double().abs() @ matrix.abs().t() + layer.bias.double().abs()
        outputs = model(inputs)
        assert outputs.dtype == torch.float32 and outputs.shape == expected.shape
        assert float(((outputs.double() - expected).abs() / size).max()) < PRECISION[form]


@pytest.mark.skipif(not int8.is_available(), reason="no VNNI")
@torch.no_grad()
def test_int8_form_with_activation_bits_has_no_further_rounding():
    layer = nn.Linear(48, 80)
    pack_layer(layer, FixedPointQuantizer(8), activation_bits=8)
    layer.input_scale.fill_(0.03)
    layer.input_zero_point.fill_(100)
    inputs = torch.randn(9, 48)
    state = {"scale": layer.input_scale, "zero_point": layer.input_zero_point}
    taken = round_activations(inputs, state, 8).double()
    expected = F.linear(taken, weight_matrix(layer).double(), layer.bias.double())
    model = optimize_for_inference(nn.Sequential(layer), "int8")
    torch.testing.assert_close(model(inputs).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(inputs[0]), model(inputs)[0])


@pytest.mark.parametrize("form", SUPPORTED)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_optimized_model_saves_its_packed_form_and_can_be_restored(form, name, tmp_path):
    model = packed(name)
    model.get_input_embeddings().weight_codebook.requires_grad = False
    before = logits(model)
    trained = [p.requires_grad for p in model.parameters()]
    model.save_pretrained(tmp_path / "before")
    classes = [type(module) for module in model.modules()]
    assert optimize_for_inference(model, form) is model
    assert [type(module) for module in model.modules()] == classes
    tolerance = {"float32": 1e-5, "bf16": 0.03, "int8": 0.1}[form]
    torch.testing.assert_close(
        logits(model), before, rtol=0, atol=tolerance * float(before.std()) + 1e-6
    )
    assert not model(input_ids=IDS).logits.requires_grad
    model.save_pretrained(tmp_path / "optimized")
    assert digest(tmp_path / "optimized") == digest(tmp_path / "before")
    assert torch.equal(logits(AutoQuantizedModel.from_pretrained(tmp_path / "optimized")), before)
    assert restore_packed(model) is model
    assert torch.equal(logits(model), before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not any(key.endswith("dense_weight") for key, _ in model.named_buffers())


def test_tied_head_gets_a_dense_weight_and_the_table_stays_packed():
    model = packed("gpt2")
    optimize_for_inference(model, "float32")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.weight_indices is head.weight_indices
    assert table.dense_form is None and head.dense_form == "weight"
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    restore_packed(model)
    assert torch.equal(generated, model.generate(IDS, max_new_tokens=4, do_sample=False))


def test_convolutions_are_held_in_their_own_dtype():
    layer = nn.Conv2d(8, 8, 3)
    pack_layer(layer, ProductQuantizer(9, 16))
    inputs, model = torch.randn(2, 8, 6, 6), nn.Sequential(layer).eval()
    with torch.no_grad():
        expected = model(inputs)
        assert torch.equal(optimize_for_inference(model, "bf16")(inputs), expected)
    assert layer.dense_form == "weight" and layer.dense_weight.dtype == torch.float32


def test_optimized_model_can_be_copied_cast_and_changed_to_another_form():
    model = optimize_for_inference(packed(), "float32")
    expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    assert torch.isfinite(logits(other.to(torch.bfloat16)).float()).all()
    optimize_for_inference(model, "bf16")
    assert not torch.equal(logits(model), expected)
    optimize_for_inference(model, "float32")
    assert torch.equal(logits(model), expected)
    restore_packed(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_restored_model_is_trainable_if_a_part_was_optimized_before():
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 48)), nn.Linear(48, 48), nn.LayerNorm(48))
    for layer in (model[0][0], model[1]):
        pack_layer(layer, ProductQuantizer(4, 16))
    model[2].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    optimize_for_inference(model[0], "bf16")
    optimize_for_inference(model, "bf16")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    restore_packed(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("is_fast", [True, False])
def test_form_follows_the_instructions_of_the_machine(is_fast, monkeypatch, caplog):
    monkeypatch.setattr(inference, "has_bf16_products", lambda device: is_fast)
    model = optimize_for_inference(packed())
    assert {layer.dense_form for _, layer in packed_layers(model)} - {None} == (
        {"bf16"} if is_fast else {"weight"}  # held in float32, the dtype of the model
    )
    assert not caplog.records
    optimize_for_inference(model, "bf16")
    assert ("form 'bf16' is slow on this machine" in caplog.text) is not is_fast


def test_restored_model_with_new_adapters_or_layers_does_not_train_what_is_below_them():
    peft = pytest.importorskip("peft")
    model = optimize_for_inference(packed(), "float32")
    lora = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=[])
    adapted = peft.get_peft_model(model, lora)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    restore_packed(model)
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.train()(input_ids=IDS).logits.sum().backward()

    model = optimize_for_inference(packed(), "float32")
    model.classifier = nn.Linear(32, 2)
    restore_packed(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_offloaded_layers_are_refused(tmp_path):
    packed().save_pretrained(tmp_path / "small")
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu"}
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "small",
        device_map={**places, "classifier": "cpu"},
        offload_folder=tmp_path / "disk",
    )
    expected = logits(model)
    with pytest.raises(ValueError, match=r"bert\.encoder\.\S+ is offloaded, and must be in memory"):
        optimize_for_inference(model, "float32")
    assert torch.equal(logits(model), expected)


def test_dequantize_gives_trainable_weights():
    model = optimize_for_inference(packed(), "bf16")
    dense = model.dequantize()
    assert not list(packed_layers(dense))
    assert dense.bert.encoder.layer[0].output.dense.weight.requires_grad


def test_misuse_raises(tmp_path):
    model = packed()
    with pytest.raises(ValueError, match="invalid form: got 'fp16', expected one of 'float32', "):
        optimize_for_inference(model, "fp16")
    with pytest.raises(ValueError, match="has no packed layer"):
        optimize_for_inference(make_model("bert"))
    with pytest.raises(TypeError, match="model"):
        optimize_for_inference("out")
    state_dict = model.state_dict()
    optimize_for_inference(model)
    with pytest.raises(
        ValueError, match=r"cannot train a model that is optimized .*restore_packed"
    ):
        model.train()(input_ids=IDS)
    with pytest.raises(
        ValueError, match=r"cannot load a state dict into a model that is optimized"
    ):
        model.load_state_dict(state_dict)
    with pytest.raises(ValueError, match="export_aqlm: the model is optimized for inference"):
        export_aqlm(model, tmp_path)


@pytest.mark.skipif(not int8.is_available(), reason="no VNNI")
def test_int8_form_refuses_gradients_of_inputs():
    model = optimize_for_inference(packed(), "int8")
    embedded = torch.randn(1, 3, 32, requires_grad=True)
    with pytest.raises(ValueError, match="gradients of inputs through int8"):
        model(inputs_embeds=embedded)


def test_int8_form_requires_instructions(monkeypatch):
    monkeypatch.setattr(int8, "is_available", lambda: False)
    model = packed(config=FixedPointConfig(bits=8))
    with pytest.raises(ValueError, match="invalid form: got 'int8', which needs a model on a CPU"):
        optimize_for_inference(model, "int8")
