"""Target sizes: met by the saved file, and allocated by the sensitivity of each weight."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.stacked import inputs_of, make_stacked
from support.tiny import make_vision_model
from transformers import RobertaConfig, RobertaForSequenceClassification

from hf_quantnoise import IPQConfig, allocate_bits, quantize_model, size_report
from hf_quantnoise.compression import file_bytes, plan_bit_allocation
from hf_quantnoise.compression.bit_allocation.sensitivity import (
    SensitivityMeter,
    interpolate,
    output_divergence,
)
from hf_quantnoise.compression.distillation.logits import logits_divergence
from hf_quantnoise.compression.distillation.losses import softmax_divergence
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.model_copies import copy_on_meta
from hf_quantnoise.quantizers import ProductQuantizer, product

SMALL = {"codebook_bits": 16, "kmeans_iter": 3}


@pytest.fixture
def saved_bytes(tmp_path):
    def save(model) -> int:
        model.save_pretrained(tmp_path / "saved")
        return (tmp_path / "saved" / "model.safetensors").stat().st_size

    return save


def stages_of(name):
    more = {"vit": [], "llama": ["embeddings", "head"]}
    return ["ffn", "attention", *more.get(name, ["embeddings"])]


CASES = [
    ("bert", 0.3, {}),
    ("gpt2", 0.2, {}),
    ("gpt2", 0.8, {}),
    ("roberta-mlm", 0.4, {"activation_bits": 8}),
    ("bart", 0.3, {"share_layers": 2}),
    ("vit", 0.6, {"codebook_bits": 8}),
    ("llama", 0.25, {"share_layers": 2, "prune_layers": "every_other"}),
    ("distilbert", 0.3, {"prune_layers": "every_other"}),
]


@pytest.mark.parametrize(("name", "share", "fields"), CASES, ids=[f"{n}-{s}" for n, s, _ in CASES])
def test_quantize_model_meets_target_size(name, share, fields, saved_bytes):
    model = make_stacked(name, 4 if "share_layers" in fields else 2)
    dense = size_report(model).total.disk_bytes
    left = dense
    if "share_layers" in fields or "prune_layers" in fields:
        left *= 0.6  # after pruning or sharing
    target = share * left / 1e6
    config = IPQConfig(target_size_mb=target, stages=stages_of(name), **{**SMALL, **fields})
    batches = [inputs_of(name)] if fields.get("activation_bits") else None
    small = quantize_model(model, config, progress=False, calibration_data=batches)
    size = saved_bytes(small)
    used = 0.96 if share < 0.5 else 0.9  # there is nothing between int8 and floating point
    assert used * target * 1e6 <= size <= target * 1e6
    assert size == size_report(small).total.disk_bytes


def test_file_bytes_counts_the_header_to_the_byte(saved_bytes):
    model = make_stacked("t5", 2)
    for config in (
        IPQConfig(n_centroids=16, codebook_bits=8, share_layers=2),
        IPQConfig(n_centroids=16, activation_bits=8, stages=["ffn"]),
    ):
        before = copy.deepcopy(model.state_dict())
        expected = file_bytes(model, config)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        packed = quantize_model(
            copy.deepcopy(model), config, progress=False, calibration_data=[inputs_of("t5")]
        )
        assert saved_bytes(packed) == expected


def test_convolution_blocks_are_kernels(saved_bytes):
    model = make_vision_model("resnet")
    target = 0.4 * size_report(model).total.disk_bytes / 1e6
    config = IPQConfig(target_size_mb=target, stages=["conv"], **SMALL)
    small = quantize_model(model, config, progress=False)
    assert saved_bytes(small) <= target * 1e6
    sizes = {
        layer.quantizer.block_size
        for _, layer in packed_layers(small)
        if isinstance(layer.quantizer, ProductQuantizer) and layer.kernel_size == (3, 3)
    }
    assert sizes <= {9}


def test_target_bits_per_weight_counts_every_parameter_and_the_full_file(saved_bytes):
    model = make_stacked("gpt2", 4)
    config = IPQConfig(target_bits_per_weight=9, share_layers=2, **SMALL)
    small = quantize_model(model, config, progress=False)
    shared = make_stacked("gpt2", 4)
    layer = sum(p.numel() for p in shared.transformer.h[0].parameters())
    weights = sum(p.numel() for p in shared.parameters()) - 2 * layer
    bits = 8 * saved_bytes(small) / weights
    assert 8.6 < bits <= 9


# ---- by sensitivity --------------------------------------------------------------------------


def uneven_model():
    """GPT-2 in which every other block contributes little to the residual stream."""
    model = make_stacked("gpt2", 4)
    with torch.no_grad():
        for number, factor in enumerate((0.02, 8.0, 0.02, 8.0)):
            for layer in (model.transformer.h[number].attn, model.transformer.h[number].mlp):
                layer.c_proj.weight *= factor
    return model


@torch.no_grad()
def true_divergence(model, reference, ids):
    return float(softmax_divergence(model(ids).logits, reference(ids).logits))


def test_allocation_beats_uniform_settings_of_the_same_size(saved_bytes):
    generator = torch.Generator().manual_seed(3)
    calibration, held_out = torch.randint(5, 320, (2, 8, 24), generator=generator)
    reference = uneven_model()
    uniform = IPQConfig(block_size=4, n_centroids=64, codebook_bits=16)
    target = file_bytes(reference, uniform) / 1e6
    config = IPQConfig(target_size_mb=target, codebook_bits=16)
    batches = [{"input_ids": calibration}]
    by_error = plan_bit_allocation(reference, config, progress=False)
    by_output = plan_bit_allocation(reference, config, batches, progress=False)
    plans = [uniform]
    plans += [replace(config, layer_quantizers=a.layer_quantizers) for a in (by_error, by_output)]
    models = [quantize_model(uneven_model(), plan, progress=False) for plan in plans]
    assert saved_bytes(models[2]) <= saved_bytes(models[0])
    worst, middle, best = (true_divergence(model, reference, held_out) for model in models)
    assert best < 0.35 * worst
    assert best < 0.7 * middle
    # The costs of single weights add up to the total divergence, on held-out data too.
    assert 0.5 < sum(weight.cost for weight in by_output.weights) / best < 2
    sizes = {weight.name: weight.bytes for weight in by_output.weights}
    for weak, strong in ((0, 1), (2, 3)):
        for layer in ("mlp.c_fc", "mlp.c_proj", "attn.c_attn"):
            name = "transformer.h.{}." + layer
            assert sizes[name.format(weak)] < sizes[name.format(strong)]


def test_weight_without_influence_on_the_batches_has_a_cost():
    model = make_stacked("gpt2", 2)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.zero_()
    config = IPQConfig(target_size_mb=0.022, **SMALL)
    found = plan_bit_allocation(model, config, [inputs_of("gpt2")], progress=False)
    weights = {weight.name.removeprefix("transformer.h."): weight for weight in found.weights}
    idle, busy = weights["0.mlp.c_fc"], weights["1.mlp.c_fc"]
    assert idle.stored != "dense" and idle.cost > 0
    assert idle.bytes < busy.bytes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_sensitivity_is_refused(value, monkeypatch):
    original = SensitivityMeter.measure

    def measure(self, layers, matrix):
        divergence = original(self, layers, matrix)
        return value if layers[0].name.endswith("1.mlp.c_fc") else divergence

    monkeypatch.setattr(SensitivityMeter, "measure", measure)
    config = IPQConfig(target_size_mb=0.022, **SMALL)
    with pytest.raises(ValueError, match=rf"h\.1\.mlp\.c_fc.* {value} .*float32"):
        plan_bit_allocation(make_stacked("gpt2", 2), config, [inputs_of("gpt2")], progress=False)


@example(points=[(1.0, 1.0), (0.25, 5e-324)], errors=[1.0, 0.999, 0.5])
@given(
    st.lists(st.tuples(st.floats(1e-6, 1), st.floats(0, 10)), min_size=1, max_size=2),
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
)
def test_interpolate_passes_through_the_points_and_increases(points, errors):
    curve = [interpolate(points, error) for error in sorted(errors)]
    assert all(a <= b * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(curve))
    error, first = min(points)
    assert interpolate(points, error) == pytest.approx(first)
    assert interpolate(points, error / 10) == pytest.approx(first / 10)


def test_output_divergence_of_logits_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 2, 5, 7, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    model, batch = make_stacked("gpt2", 1), {"attention_mask": mask}
    outputs, reference = {"logits": output}, {"logits": target}
    divergence = output_divergence(model, outputs, reference, batch)
    assert divergence == float(logits_divergence(model, outputs, reference, batch)) > 0
    padded = output + 5 * (1 - mask)[..., None] * torch.randn(2, 5, 7, generator=generator)
    assert output_divergence(model, {"logits": padded}, reference, batch) == divergence


def test_output_divergence_of_hidden_states_is_the_relative_error():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 2, 5, 7, generator=generator)
    relative = float((output - target).square().sum() / target.square().sum())
    hidden = {"last_hidden_state": output}, {"last_hidden_state": target}
    divergence = output_divergence(make_stacked("gpt2", 1), *hidden, {})
    assert divergence == pytest.approx(relative, rel=1e-5)


def test_model_without_head_is_allocated_by_hidden_states():
    model = make_stacked("bert", 2).bert
    config = IPQConfig(target_size_mb=0.04, **SMALL)
    found = plan_bit_allocation(model, config, [inputs_of("bert")], progress=False)
    assert found.file_bytes <= 40_000
    assert any(weight.cost > 0 for weight in found.weights)


def test_plan_bit_allocation_changes_neither_model_nor_rng_state():
    model = make_stacked("gpt2", 2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches = [inputs_of("gpt2")]
    plan_bit_allocation(model, IPQConfig(target_size_mb=0.035, **SMALL), batches, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and list(map(id, model.parameters())) == parameters
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_copy_of_shapes_is_on_meta_and_keeps_ties():
    model = make_stacked("gpt2", 2)
    shapes = copy_on_meta(model)
    assert all(p.is_meta for p in shapes.parameters())
    assert shapes.lm_head.weight is shapes.transformer.wte.weight
    assert not any(p.is_meta for p in model.parameters())


# ---- the size of the paper's models (table 7) ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("megabytes", "fields"), [(38, {}), (14, {"share_layers": 2, "prune_layers": "every_other"})]
)
def test_roberta_base_meets_the_sizes_of_table_7(megabytes, fields, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig()).eval()
    config = IPQConfig(target_size_mb=megabytes, codebook_bits=16, kmeans_iter=1, **fields)
    config = allocate_bits(model, config, progress=False)

    # The size does not depend on the values of codes and centroids, and fitting takes minutes.
    def any_codes(points, centroids, weights=None, dtype=torch.int64):
        return (torch.arange(len(points)) % len(centroids)).to(dtype)

    def any_fit(points, n_centroids, **_):
        centroids = points[:n_centroids].float()
        return centroids, any_codes(points, centroids)

    monkeypatch.setattr(product, "assign", any_codes)
    monkeypatch.setattr(product, "kmeans", any_fit)
    quantize_model(model, config, progress=False).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0.99 * megabytes * 1e6 <= size <= megabytes * 1e6
