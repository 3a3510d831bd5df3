"""A size on disk: never exceeded, used up, shared out by sensitivity, edited and used again."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from stacked import inputs_of, make_stacked
from test_stages import make_trainer
from tiny import make_vision_model
from transformers import RobertaConfig, RobertaForSequenceClassification

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    allot,
    apply_quant_noise,
    quantize_model,
    size_report,
)
from hf_quantnoise.compression import budget, check_plan, file_bytes, plan_budget
from hf_quantnoise.compression.distillation import distillation_loss
from hf_quantnoise.compression.sensitivity import divergence
from hf_quantnoise.configuration import QuantizedModelConfig
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.modeling.copies import copy_of_shapes
from hf_quantnoise.quantizers import ProductQuantizer

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
def test_the_file_is_within_the_target_and_uses_it(name, share, fields, saved_bytes):
    model = make_stacked(name, 4 if "share_layers" in fields else 2)
    dense = size_report(model).total.disk_bytes
    left = dense
    if "share_layers" in fields or "prune_layers" in fields:
        left *= 0.6  # what is left when layers are gone
    target = share * left / 1e6
    config = IPQConfig(target_size_mb=target, stages=stages_of(name), **{**SMALL, **fields})
    batches = [inputs_of(name)] if fields.get("activation_bits") else None
    small = quantize_model(model, config, progress=False, calibration_data=batches)
    size = saved_bytes(small)
    used = 0.96 if share < 0.5 else 0.9  # between int8 and floating point there is nothing
    assert used * target * 1e6 <= size <= target * 1e6
    assert size == size_report(small).total.disk_bytes


def test_the_header_is_counted_to_the_byte(saved_bytes):
    """What a config will take is known before anything is packed."""
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


def test_convolutions_have_their_kernels_as_blocks(saved_bytes):
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


def test_bits_per_weight_count_every_parameter_and_the_whole_file(saved_bytes):
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
    """GPT-2 with blocks that add much to the residual stream, and blocks that add nothing much."""
    model = make_stacked("gpt2", 4)
    with torch.no_grad():
        for number, factor in enumerate((0.02, 8.0, 0.02, 8.0)):
            for layer in (model.transformer.h[number].attn, model.transformer.h[number].mlp):
                layer.c_proj.weight *= factor
    return model


@torch.no_grad()
def true_divergence(model, reference, ids):
    return float(distillation_loss(model(ids).logits, reference(ids).logits))


def test_it_beats_a_uniform_plan_of_the_same_size(saved_bytes):
    generator = torch.Generator().manual_seed(3)
    calibration, held_out = torch.randint(5, 320, (2, 8, 24), generator=generator)
    reference = uneven_model()
    uniform = IPQConfig(block_size=4, n_centroids=64, codebook_bits=16)
    target = file_bytes(reference, uniform) / 1e6
    config = IPQConfig(target_size_mb=target, codebook_bits=16)
    batches = [{"input_ids": calibration}]
    by_error = plan_budget(reference, config, progress=False)
    by_output = plan_budget(reference, config, batches, progress=False)
    plans = [uniform]
    plans += [replace(config, layer_quantizers=a.layer_quantizers) for a in (by_error, by_output)]
    models = [quantize_model(uneven_model(), plan, progress=False) for plan in plans]
    assert saved_bytes(models[2]) <= saved_bytes(models[0])
    worst, middle, best = (true_divergence(model, reference, held_out) for model in models)
    assert best < 0.35 * worst
    assert best < 0.7 * middle
    # The costs of single weights say what they do together, on data they were not measured on.
    assert 0.5 < sum(weight.cost for weight in by_output.weights) / best < 2
    sizes = {weight.name: weight.bytes for weight in by_output.weights}
    for weak, strong in ((0, 1), (2, 3)):
        for layer in ("mlp.c_fc", "mlp.c_proj", "attn.c_attn"):
            name = "transformer.h.{}." + layer
            assert sizes[name.format(weak)] < sizes[name.format(strong)]


@pytest.mark.parametrize("masked", [False, True])
def test_the_divergence_is_the_teacher_s_without_what_is_padding(masked):
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 2, 5, 7, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    batch = {"attention_mask": mask} if masked else {}
    keep = mask.bool() if masked else torch.ones(2, 5, dtype=torch.bool)
    p, q = other.double().softmax(-1), own.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1)[keep].mean())
    found = divergence({"logits": own}, {"logits": other}, batch)
    assert found == pytest.approx(expected, rel=1e-5)
    # Two heads (start and end of an answer) add up; hidden states have no softmax.
    twice = {"start_logits": own, "end_logits": own}, {"start_logits": other, "end_logits": other}
    assert divergence(*twice, batch) == pytest.approx(2 * expected, rel=1e-5)
    relative = float((own - other).square().sum() / other.square().sum())
    found = divergence({"last_hidden_state": own}, {"last_hidden_state": other}, batch)
    assert found == pytest.approx(relative, rel=1e-5)


def test_a_model_without_a_head_is_measured_by_its_hidden_states():
    model = make_stacked("bert", 2).bert
    config = IPQConfig(target_size_mb=0.04, **SMALL)
    found = plan_budget(model, config, [inputs_of("bert")], progress=False)
    assert found.file_bytes <= 40_000
    assert any(weight.cost > 0 for weight in found.weights)


def test_measuring_leaves_the_model_and_the_random_state_alone():
    model = make_stacked("gpt2", 2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches = [inputs_of("gpt2")]
    plan_budget(model, IPQConfig(target_size_mb=0.035, **SMALL), batches, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and list(map(id, model.parameters())) == parameters
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_copy_of_shapes_has_no_memory_and_the_same_ties():
    model = make_stacked("gpt2", 2)
    shapes = copy_of_shapes(model)
    assert all(p.is_meta for p in shapes.parameters())
    assert shapes.lm_head.weight is shapes.transformer.wte.weight
    assert not any(p.is_meta for p in model.parameters())


# ---- the allotment: shown, saved, edited, used again -----------------------------------------


@pytest.fixture(scope="module")
def allotted():
    return allot(make_stacked("bert", 2), IPQConfig(target_size_mb=0.04, **SMALL), progress=False)


def test_the_table_shows_every_weight_and_the_size(capsys):
    model = make_stacked("gpt2", 2)
    config = allot(model, IPQConfig(target_size_mb=0.035, **SMALL))
    printed = capsys.readouterr().out
    for name in config.layer_quantizers:
        assert name in printed
    assert "transformer.wte (+1)" in printed  # the head holds it too
    assert "MB of 0.035 MB" in printed and "cost" in printed


def test_an_allotment_survives_json_and_makes_the_same_file_again(allotted, tmp_path):
    values = json.loads(allotted.to_json_string())
    again = QuantizedModelConfig.from_dict(values)
    assert again.layer_quantizers == allotted.layer_quantizers
    for folder, config in (("a", allotted), ("b", again)):
        quantize_model(make_stacked("bert", 2), config, progress=False).save_pretrained(
            tmp_path / folder
        )
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    stored = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert stored["layer_quantizers"] == allotted.layer_quantizers
    assert stored["target_size_mb"] == 0.04
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "a")
    assert loaded.config.quantization_config.layer_quantizers == allotted.layer_quantizers
    # A loaded model's config, plan and all, is one to quantize another model with.
    other = quantize_model(
        make_stacked("bert", 2), loaded.config.quantization_config, progress=False
    )
    assert other.config.quantization_config.plan == loaded.config.quantization_config.plan


def test_an_edited_allotment_is_carried_out_and_not_measured_again(allotted, monkeypatch):
    monkeypatch.setattr("hf_quantnoise.compression.budget.choices_for", None)
    edited = copy.deepcopy(allotted)
    query = "bert.encoder.layer.0.attention.self.query"
    key = "bert.encoder.layer.1.attention.self.key"
    edited.layer_quantizers[query] = {"scheme": "int", "bits": 2}
    edited.layer_quantizers[key] = {"scheme": "pq", "block_size": 8, "n_centroids": 16}
    small = quantize_model(make_stacked("bert", 2), edited, progress=False)
    assert small.get_submodule(query).quantizer.short_name == "int2"
    assert small.get_submodule(key).quantizer.short_name == "pq 16x8"


def test_an_edited_allotment_over_the_target_is_refused(allotted):
    edited = copy.deepcopy(allotted)
    for name in list(edited.layer_quantizers)[:8]:
        edited.layer_quantizers[name] = {"scheme": "dense"}
    model = make_stacked("bert", 2)
    with pytest.raises(ValueError, match=r"target_size_mb=0.04 allows 40,000 bytes.*makes a file"):
        quantize_model(model, edited, progress=False)
    assert not list(packed_layers(model))


def test_a_plan_of_another_run_is_an_allotment():
    first = quantize_model(make_stacked("gpt2", 2), IPQConfig(n_centroids=16), progress=False)
    plan = first.config.quantization_config.plan
    again = quantize_model(
        make_stacked("gpt2", 2), IPQConfig(layer_quantizers=plan, block_size=8), progress=False
    )
    assert again.config.quantization_config.plan == plan


def test_pruned_and_shared_layers_are_named_as_they_are_afterwards(tmp_path):
    fields = {"share_layers": 2, "prune_layers": "every_other"}
    config = IPQConfig(target_size_mb=0.027, **fields, **SMALL)
    config = allot(make_stacked("bert", 8), config, progress=False)
    numbers = {n.split(".")[3] for n in config.layer_quantizers if ".layer." in n}
    assert numbers == {"0", "2"}  # four of eight are left, in two chunks
    small = quantize_model(make_stacked("bert", 8), config, progress=False)
    small.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 27_000
    again = AutoQuantizedModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = [m(**inputs_of("bert")).logits for m in (small.eval(), again)]
    assert torch.equal(*logits)


# ---- in the staged pass ----------------------------------------------------------------------


def test_the_staged_pass_measures_on_its_training_data(tmp_path, parity_data, capsys, monkeypatch):
    seen = []
    measured = budget.costs_by_output
    monkeypatch.setattr(
        budget, "costs_by_output", lambda *args: seen.append(args[2]) or measured(*args)
    )
    trainer = make_trainer(tmp_path / "run", parity_data, QuantNoiseConfig(p=0.1))
    args = CompressionArguments(stage_epochs=0.2, budget_batches=2)
    small = trainer.compress(IPQConfig(target_size_mb=0.045, **SMALL), args)
    assert len(seen) == 1 and len(seen[0]) == 2
    assert seen[0][0]["input_ids"].shape == (16, 8)
    assert "MB of 0.045 MB" in capsys.readouterr().out
    assert [record["stage"] for record in trainer.compression_history][0] == "dense"
    small.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size <= 45_000
    assert small.config.quantization_config.layer_quantizers


def test_a_stage_that_is_left_dense_is_passed_over(tmp_path, parity_data):
    layers = {
        name: {"scheme": "dense"}
        for name, layer in make_stacked("bert", 2).named_modules()
        if "attention" in name and hasattr(layer, "weight") and "LayerNorm" not in name
    }
    trainer = make_trainer(tmp_path, parity_data)
    small = trainer.compress(
        IPQConfig(n_centroids=16, layer_quantizers=layers), CompressionArguments(stage_epochs=0)
    )
    stages = [record["stage"] for record in trainer.compression_history]
    assert stages == ["dense", "ffn", "embeddings"]
    reasons = small.config.quantization_config.left_dense
    assert all(reasons[name] == "layer_quantizers leaves it dense" for name in layers)


# ---- what is refused -------------------------------------------------------------------------


def test_an_unreachable_target_says_what_is_reachable():
    model = make_stacked("bert", 2)
    before = copy.deepcopy(model.state_dict())
    config = IPQConfig(target_size_mb=0.01, prune_layers="every_other")
    with pytest.raises(ValueError, match="smallest allotment takes"):
        check_plan(model, config)
    with pytest.raises(ValueError) as error:
        quantize_model(model, config, progress=False)
    for words in (
        "target_size_mb=0.01 allows 10,000 bytes", "smallest allotment takes", "bits per weight",
        "no stage quantizes", "stages may also have head", "codebook_bits", "prune_layers",
    ):  # fmt: skip
        assert words in str(error.value)
    assert model.config.num_hidden_layers == 2
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    size = int(str(error.value).split("takes ")[1].split(" ")[0].replace(",", ""))
    reachable = IPQConfig(target_size_mb=size / 1e6, prune_layers="every_other", kmeans_iter=1)
    small = quantize_model(model, reachable, progress=False)
    assert size_report(small).total.disk_bytes <= size


NAME = "bert.encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_size_mb": 5}, ["target_size_mb=5", "without quantization", "smaller target"]),
        ({"layer_quantizers": {"bert.encoder.layer.0.output.dens": {"scheme": "dense"}}},
         ["'bert.encoder.layer.0.output.dens'", "no such layer", f"Did you mean '{NAME}'"]),
        ({"layer_quantizers": {NAME: {"scheme": "pqq"}}}, [NAME, "'pqq'", "known: ", "pq"]),
        ({"layer_quantizers": {NAME: {"scheme": "int", "bit": 4}}}, [NAME, "bit"]),
        ({"layer_quantizers": {NAME: {"scheme": "pq", "block_size": 7}}},
         [NAME, "block size 7 does not divide"]),
        ({"layer_quantizers": {"classifier": {"scheme": "int", "bits": 4}}},
         ["'classifier'", "in no stage", "stages="]),
        ({"layer_quantizers": {NAME: {"scheme": "dense"}}, "exclude_modules": [NAME]},
         [NAME, "exclude_modules"]),
        ({"layer_quantizers": {"bert.encoder.layer.0.output.dense": {"scheme": "int", "bits": 2},
                               "bert.encoder.layer.1.output.dense": {"scheme": "int", "bits": 3}},
          "share_layers": 2}, ["one weight", "two ways"]),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_out_is_refused_before_anything_is_changed(fields, words):
    model = make_stacked("bert", 2)
    with pytest.raises(ValueError) as error:
        quantize_model(model, IPQConfig(n_centroids=16, **fields), progress=False)
    for word in words:
        assert word in str(error.value)
    assert not list(packed_layers(model))


def test_errors_of_use(tmp_path):
    model = make_stacked("bert", 2)
    with pytest.raises(ValueError, match="has no target"):
        plan_budget(model, IPQConfig())
    with pytest.raises(TypeError, match="FixedPointConfig"):
        plan_budget(model, FixedPointConfig())
    config = IPQConfig(target_size_mb=0.04)
    with pytest.raises(ValueError, match="remove_quant_noise"):
        plan_budget(apply_quant_noise(make_stacked("bert", 2), QuantNoiseConfig()), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="target_size_mb=0.04: from_pretrained does not"):
        type(model).from_pretrained(tmp_path, quantization_config=config)
    unmoved = copy.deepcopy(model)
    with torch.no_grad():
        unmoved.classifier.weight.zero_()
    with pytest.raises(ValueError, match="left the output of all calibration batches as it is"):
        plan_budget(unmoved, config, [inputs_of("bert")], progress=False)


# ---- the size of the paper's models (table 7) ------------------------------------------------


def quick_fit(self, matrix, *, seed=0, init=None):
    """Any centroids will do where only bytes are counted."""
    blocks = matrix.reshape(-1, self.block_size)
    return {"codebook": blocks[: self.n_centroids].clone() if init is None else init["codebook"]}


@pytest.mark.slow  # about two minutes of one core each
@pytest.mark.parametrize(
    ("megabytes", "fields"), [(38, {}), (14, {"share_layers": 2, "prune_layers": "every_other"})]
)
def test_roberta_base_at_the_sizes_of_table_7(megabytes, fields, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig()).eval()
    config = IPQConfig(target_size_mb=megabytes, codebook_bits=16, kmeans_iter=1, **fields)
    config = allot(model, config, progress=False)
    monkeypatch.setattr(ProductQuantizer, "fit", quick_fit)
    quantize_model(model, config, progress=False).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0.99 * megabytes * 1e6 <= size <= megabytes * 1e6
