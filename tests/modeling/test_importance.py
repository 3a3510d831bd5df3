"""Importance of weights against references, and its effect on the output error."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.stored import layers_of_stages
from support.tiny import make_model, make_vision_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import (
    CompressionArguments,
    IPQConfig,
    QuantNoiseTrainer,
    quantize_model,
    size_report,
)
from hf_quantnoise.blocks import weight_matrix
from hf_quantnoise.modeling import pack_layer, packed_layers, packer
from hf_quantnoise.modeling.importance import DAMPING, measure_importance
from hf_quantnoise.quantizers import ProductQuantizer

WEIGHTED = IPQConfig(n_centroids=16, importance="activations")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(count=3, length=9):
    generator = torch.Generator().manual_seed(7)
    return [
        {"input_ids": torch.randint(5, 320, (4, length), generator=generator)} for _ in range(count)
    ]


def damped(moments):
    """Return moments with the damping of the module, in float64."""
    moments = moments.double()
    moments = moments + DAMPING * moments.mean()
    return moments / moments.mean()


def measured(layer, inputs):
    (importance,) = measure_importance(layer, [[layer]], inputs, layer)
    return importance.double()


@pytest.mark.parametrize("layer", [nn.Linear(12, 5), Conv1D(5, 12)], ids=["linear", "conv1d"])
def test_importance_of_columns_is_diagonal_of_xtx(layer):
    inputs = [normal(3, 4, 12, seed=s) * torch.arange(1, 13) for s in range(2)]
    rows = torch.cat(inputs).reshape(-1, 12).double()
    torch.testing.assert_close(measured(layer, inputs), damped((rows.t() @ rows).diag()[None]))


CONVOLUTIONS = {
    "1d": nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2),
    "1d depthwise": nn.Conv1d(6, 12, 4, groups=6, padding=3, padding_mode="circular"),
    "1x1": nn.Conv2d(6, 8, 1),
    "3x3": nn.Conv2d(6, 8, 3, padding=1),
    "strided": nn.Conv2d(6, 8, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1)),
    "same": nn.Conv2d(6, 8, 4, padding="same"),
    "reflect": nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "grouped": nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": nn.Conv2d(6, 12, 3, groups=6, padding=1, stride=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_importance_of_convolution_uses_unfolded_patches(name):
    """The reference convolves squared inputs with a kernel that is one at a single column."""
    layer = CONVOLUTIONS[name]
    dims = len(layer.kernel_size)
    inputs = normal(2, 6, *(11, 10)[:dims]) * torch.arange(1.0, 7.0).view(6, *[1] * dims)
    convolve = {1: F.conv1d, 2: F.conv2d}[dims]
    rows, columns = weight_matrix(layer).shape
    expected = torch.empty(rows, columns, dtype=torch.float64)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode).square().double()
    for column in range(columns):
        kernel = torch.zeros(rows, columns, dtype=torch.float64)
        kernel[:, column] = 1
        picked = convolve(
            padded, kernel.view_as(layer.weight), None, layer.stride, 0, layer.dilation,
            layer.groups,
        )  # fmt: skip
        expected[:, column] = picked.sum((0, *range(2, dims + 2)))
    found = measured(layer, [inputs])
    assert found.shape == ((1 if layer.groups == 1 else rows), columns)
    torch.testing.assert_close(found.expand(rows, columns), damped(expected))


def test_importance_of_table_counts_lookups():
    table = nn.Embedding(10, 4)
    ids = [torch.tensor([[1, 1, 2], [9, 1, 1]]), torch.tensor([[2]])]
    counts = torch.bincount(torch.cat([i.flatten() for i in ids]), minlength=10).double() + 1
    torch.testing.assert_close(measured(table, ids), (counts / counts.mean())[:, None])


def test_lookups_with_offset_are_counted_by_row():
    config = OPTConfig(
        hidden_size=32, num_hidden_layers=1, ffn_dim=64, num_attention_heads=2, vocab_size=320,
        max_position_embeddings=40, word_embed_proj_dim=32,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    positions = model.model.decoder.embed_positions
    (found,) = measure_importance(model, [[positions]], batches(2))
    seen = (found[:, 0] > found.min()).nonzero().flatten().tolist()
    assert seen == list(range(2, 2 + 9))  # OPT's rows begin at 2


def test_padding_is_ignored():
    model = make_model("bert")
    padded, plain = batches(1)[0], batches(1)[0]
    padded["attention_mask"] = torch.ones(4, 9, dtype=torch.long)
    padded["attention_mask"][:, 6:] = 0
    padded["input_ids"][:, 6:] = 0
    plain = {"input_ids": plain["input_ids"][:, :6]}
    table, matrix = model.bert.embeddings.word_embeddings, model.bert.encoder.layer[0].output.dense
    for layer in (table, matrix):
        found, expected = (measure_importance(model, [[layer]], [b])[0] for b in (padded, plain))
        torch.testing.assert_close(found, expected)


def test_inputs_without_positions_are_not_masked():
    """The pooled output (batch, hidden) can have the shape of the mask."""
    model = make_model("bert")
    batch = batches(1, length=32)[0]
    batch["attention_mask"] = torch.ones(4, 32, dtype=torch.long)
    batch["attention_mask"][:2, 20:] = 0
    with torch.no_grad():
        pooled = model.bert(**batch).pooler_output
    (found,) = measure_importance(model, [[model.classifier]], [batch])
    torch.testing.assert_close(found.double(), damped(pooled.double().square().sum(0)[None]))


def test_importance_of_tied_table_and_head():
    model = make_model("gpt2")
    table, head = model.transformer.wte, model.lm_head
    ids = batches()
    (found,) = measure_importance(model, [[table, head]], ids)
    assert found.shape == (320, 32)
    counts = torch.bincount(torch.cat([b["input_ids"].flatten() for b in ids]), minlength=320) + 1.0
    with torch.no_grad():
        hidden = torch.cat([model.transformer(**b)[0].reshape(-1, 32) for b in ids])
    rows, columns = counts.double() / counts.mean(), damped(hidden.double().square().sum(0))
    expected = (rows[:, None] + columns[None]) / 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_importance_of_shared_weight_is_summed():
    first, second = nn.Linear(8, 4, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    x, y = normal(5, 8) * 3, normal(5, 8, seed=1)
    (found,) = measure_importance(model, [[first, second]], [0], lambda _: (first(x), second(y)))
    expected = damped((x.double().square() + y.double().square()).sum(0)[None])
    torch.testing.assert_close(found.double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_importance_lowers_output_error_of_layers(dtype):
    """||X (W - W_q)^T||^2 in float64 on inputs of unequal moments, layer by layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, groups=4))
    model = model.to(dtype)
    linear, one, grouped = model
    scales = {linear: normal(32), one: normal(64, 1, 1), grouped: normal(64, 1, 1)}
    for layer in model:
        shape = (200, 32) if layer is linear else (4, 64, 7, 7)
        inputs = (normal(*shape) * (scales[layer] * 1.5).exp()).to(dtype)
        (importance,) = measure_importance(layer, [[layer]], [inputs], layer)
        assert importance.dtype == torch.float32
        errors = []
        for weights in (None, importance):
            errors.append(output_error(layer, inputs, weights))
        assert errors[1] < 0.9 * errors[0], layer


@torch.no_grad()
def output_error(layer, inputs, importance):
    size = 9 if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) else 4
    packed = copy.deepcopy(layer)
    pack_layer(packed, ProductQuantizer(size, 16), importance=importance)
    dense = copy.deepcopy(layer).double()
    expected = dense(inputs.double())
    dense.weight.data.copy_(packed.weight.detach())
    return float((dense(inputs.double()) - expected).square().sum())


@pytest.mark.parametrize(("name", "bits"), [("bert", 8), ("bert-mlm", 32), ("gpt2", 16)])
def test_importance_does_not_change_size(name, bits, input_ids, tmp_path):
    config = IPQConfig(n_centroids=16, importance="activations", codebook_bits=bits)
    model = quantize_model(make_model(name), config, progress=False, calibration_data=batches())
    plain = IPQConfig(n_centroids=16, codebook_bits=bits)
    other = quantize_model(make_model(name), plain, progress=False)
    assert size_report(model).total == size_report(other).total
    names = [n for n, _ in packed_layers(model)]
    assert any(
        not torch.equal(model.get_submodule(n).weight, other.get_submodule(n).weight) for n in names
    )
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.quantization_config.importance == "activations"
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)


def test_importance_with_activation_bits_in_image_model():
    model = make_vision_model("mobilenet-v2")
    data = [{"pixel_values": normal(2, 3, 32, 32)}]
    config = IPQConfig(n_centroids=16, stages=["conv"], importance="activations", activation_bits=8)
    model = quantize_model(model, config, progress=False, calibration_data=data)
    layers = layers_of_stages(model)
    assert any(layer.groups > 1 for layer in layers)
    assert all(float(layer.input_scale) > 0 for layer in layers)


def test_measure_importance_leaves_model_unchanged():
    model = make_model("bert").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    layer = model.bert.encoder.layer[0].output.dense
    measure_importance(model, [[layer]], batches())
    assert model.training and not layer._forward_pre_hooks
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_missing_calibration_data_raises(input_ids, tmp_path):
    model = make_model("bert")
    before = model(input_ids).logits
    with pytest.raises(ValueError, match="importance needs calibration data"):
        quantize_model(model, WEIGHTED, progress=False)
    args = TrainingArguments(str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="importance needs calibration data"):
        QuantNoiseTrainer(model, args).compress(WEIGHTED, CompressionArguments(stage_epochs=0))
    assert torch.equal(model(input_ids).logits, before)
    with pytest.raises(ValueError, match=r"importance.*'gradients'"):
        IPQConfig(importance="gradients")


def test_layer_that_never_runs_is_named():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6)])
    with pytest.raises(ValueError, match=r": 1 never ran.*exclude_modules=\['1'\]"):
        measure_importance(model, [[model[1]]], [normal(2, 4)], model[0])


def test_compress_measures_importance_before_each_stage(tmp_path, parity_data, monkeypatch):
    calls = []

    def watched(model, weights, batches, forward):
        calls.append((len(list(packed_layers(model))), len(weights), len(batches)))
        return measure_importance(model, weights, batches, forward)

    monkeypatch.setattr(packer, "measure_importance", watched)
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, disable_tqdm=True, report_to="none"
    )
    trainer = QuantNoiseTrainer(make_model("bert"), args, train_dataset=parity_data)
    arguments = CompressionArguments(stage_epochs=0, calibration_batches=2)
    small = trainer.compress(WEIGHTED, arguments)
    packed = len(layers_of_stages(small))
    assert [count for _, _, count in calls] == [2, 2, 2]
    assert [before for before, _, _ in calls] == [0, calls[0][1], calls[0][1] + calls[1][1]]
    assert sum(number for _, number, _ in calls) == packed


def test_importance_lowers_error_of_language_model(tmp_path):
    """A GPT-2 with a few channels of large activations, which plain k-means does not know."""
    model = make_model("gpt2")
    for block in model.transformer.h:
        for norm in (block.ln_1, block.ln_2):
            norm.weight.data[:4] = 8.0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = torch.cat([model(**b).logits for b in batches(8)]).double()
    errors = []
    for importance in ("none", "activations"):
        config = IPQConfig(n_centroids=16, stages=["ffn", "attention"], importance=importance)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path)
        small = quantize_model(dense, config, progress=False, calibration_data=batches(8)).eval()
        with torch.no_grad():
            found = torch.cat([small(**b).logits for b in batches(8)]).double()
        errors.append(float((found - expected).square().mean()))
    assert errors[1] < 0.8 * errors[0]
