"""The staged pass: what moves, what is learnt, what is reported, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from support.stacked import inputs_of, make_stacked
from support.stage_runs import make_pass_trainer
from support.tiny import make_model
from transformers import TrainingArguments

from hf_quantnoise import (
    AutoQuantizedModel,
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    quantize_model,
    size_report,
)
from hf_quantnoise.compression.distillation.teacher import Teacher
from hf_quantnoise.compression.training.packed_trainer import loss_reads_num_items
from hf_quantnoise.modeling import packed_layers

CONFIG = IPQConfig(block_size=4, n_centroids=16)


def accuracy(prediction):
    logits, labels = prediction
    return {"accuracy": float((np.argmax(logits, -1) == labels).mean())}


def make_trainer(tmp_path, data, noise=None, model="bert", **arguments):
    model = make_model(model) if isinstance(model, str) else model
    parts = {"compute_metrics": accuracy}
    return make_pass_trainer(tmp_path, model, data, noise, parts, **arguments)


def test_the_stages_come_in_the_paper_s_order_and_are_reported(tmp_path, parity_data, capsys):
    trainer = make_trainer(tmp_path, parity_data, QuantNoiseConfig(p=0.1))
    trainer.train()
    seen = []
    small = trainer.compress(CONFIG, report=lambda record: seen.append(record.to_dict()))
    assert seen == trainer.compression_history
    history = trainer.compression_history
    assert [record["stage"] for record in history] == ["dense", "ffn", "embeddings", "attention"]
    assert [record["layers"] for record in history] == [0, 4, 2, 8]
    sizes = [record["mb"] for record in history]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == pytest.approx(size_report(small).total.disk_bytes / 1e6)
    assert all("eval_accuracy" in record["metric"] for record in history)
    assert all(0 < record["relative_error"] < 1 for record in history[1:])
    printed = capsys.readouterr().out
    for stage in ("dense", "ffn", "embeddings", "attention"):
        assert any(line.startswith(stage) and "MB" in line for line in printed.splitlines())


def test_it_returns_the_model_itself_packed_and_ready(tmp_path, parity_data, input_ids):
    trainer = make_trainer(tmp_path / "run", parity_data, QuantNoiseConfig(p=0.1))
    model = trainer.model
    small = trainer.compress(CONFIG)
    assert small is model is trainer.model
    assert not small.training
    small.save_pretrained(tmp_path / "small")
    again = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, small(input_ids).logits)


def test_finetuning_moves_centroids_and_dense_parameters_but_no_codes(tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data)
    one_shot = quantize_model(copy.deepcopy(trainer.model), IPQConfig(**_fields(stages=["ffn"])))
    trainer.compress(IPQConfig(**_fields(stages=["ffn"])))
    before, after = dict(one_shot.named_parameters()), dict(trainer.model.named_parameters())
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        same = torch.equal(parameter, before[name])
        assert same == name.endswith("weight_indices"), name


def _fields(**changes):
    return {"block_size": 4, "n_centroids": 16, **changes}


def test_zero_epochs_is_quantize_model(tmp_path, parity_data, input_ids):
    trainer = make_trainer(tmp_path, parity_data)
    expected = quantize_model(copy.deepcopy(trainer.model), CONFIG, progress=False)
    trainer.train_dataset = None
    small = trainer.compress(CONFIG, CompressionArguments(stage_epochs=0))
    with torch.no_grad():
        assert torch.equal(small(input_ids).logits, expected(input_ids).logits)


def test_a_teacher_pulls_the_student_to_its_logits(tmp_path, parity_data):
    """Labels are turned round, so that only a student of the teacher can agree with it."""
    trainer = make_trainer(tmp_path, parity_data, num_train_epochs=8)
    trainer.train()
    teacher = copy.deepcopy(trainer.model).eval()
    turned = parity_data.map(lambda row: {"labels": 1 - row["labels"]})
    trainer.train_dataset = turned
    small = trainer.compress(
        CONFIG, CompressionArguments(stage_epochs=3, codebook_learning_rate=2e-3)
    )
    ids = torch.tensor(parity_data["input_ids"])
    with torch.no_grad():
        agreement = (small(ids).logits.argmax(-1) == teacher(ids).logits.argmax(-1)).float().mean()
    assert agreement > 0.8


def test_the_given_teacher_is_used_and_left_alone(tmp_path, parity_data):
    teacher = make_model("bert", seed=5).train()
    before = copy.deepcopy(teacher.state_dict())
    calls = []
    teacher.register_forward_hook(
        lambda module, *_: calls.append(torch.is_grad_enabled() or module.training)
    )
    make_trainer(tmp_path, parity_data).compress(CONFIG, teacher=teacher)
    # One batch to see that they go together, then three stages of six.
    assert len(calls) == 1 + 3 * 6 and not any(calls)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_labels_alone(tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data)
    trainer.compress(CONFIG, CompressionArguments(distill=False))
    assert trainer.compression_history[-1]["finetuning"]["train_loss"] > 0


@pytest.mark.parametrize("distill", [True, False])
def test_gradient_accumulation_does_not_multiply_the_loss(tmp_path, parity_data, distill):
    losses = {}
    for steps in (1, 2, 4):
        trainer = make_trainer(
            tmp_path,
            parity_data,
            learning_rate=1e-8,
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=16 // steps,
        )
        arguments = CompressionArguments(distill=distill, distill_weight=0.5)
        trainer.compress(IPQConfig(**_fields(stages=["ffn"])), arguments)
        losses[steps] = trainer.compression_history[-1]["finetuning"]["train_loss"]
    assert losses[2] == pytest.approx(losses[1], rel=0.05)
    assert losses[4] == pytest.approx(losses[1], rel=0.05)


def test_which_heads_read_num_items_in_batch():
    assert loss_reads_num_items(make_model("gpt2"))
    assert not loss_reads_num_items(make_model("bert"))


def test_stock_accumulation_is_mended_in_the_noise_phase_too(tmp_path, parity_data):
    assert make_trainer(tmp_path, parity_data).model_accepts_loss_kwargs is False
    assert make_trainer(tmp_path, parity_data, model="gpt2").model_accepts_loss_kwargs is True


def test_centroids_have_no_weight_decay_and_their_own_rate(tmp_path, parity_data):
    from hf_quantnoise.compression.stages import StageTrainer

    model = quantize_model(make_model("bert"), CONFIG, progress=False)
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True)
    trainer = StageTrainer(
        model, args, compression_args=CompressionArguments(codebook_learning_rate=5e-4)
    )
    optimizer = trainer.create_optimizer()
    codebooks = {id(layer.weight_codebook) for _, layer in packed_layers(model)}
    seen = 0
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if id(p) in codebooks]
        seen += len(own)
        if own:
            assert len(own) == len(group["params"])
            assert (group["lr"], group["weight_decay"]) == (5e-4, 0.0)
    assert seen == len(codebooks)
    assert not any("weight_" in name for name in trainer.get_decay_parameter_names(model))


def test_training_goes_on_after_compression_and_after_loading(tmp_path, parity_data):
    trainer = make_trainer(tmp_path / "a", parity_data, QuantNoiseConfig(p=0.1))
    small = trainer.compress(CONFIG, CompressionArguments(stage_epochs=0))
    small.save_pretrained(tmp_path / "small")
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    for model in (small, loaded):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        again = make_trainer(tmp_path / "b", parity_data)
        again = type(again)(model, again.args, train_dataset=parity_data)
        again.train()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == name.endswith("weight_indices"), name


def test_resuming_a_packed_run_is_exact_and_a_dense_model_is_refused(tmp_path, parity_data):
    config = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    small = quantize_model(make_model("bert"), CONFIG, progress=False)
    trainer = make_trainer(tmp_path, parity_data, **config)
    straight = type(trainer)(copy.deepcopy(small), trainer.args, train_dataset=parity_data)
    straight.train()
    resumed = type(trainer)(copy.deepcopy(small), trainer.args, train_dataset=parity_data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, straight.model.get_parameter(name)), name
    with pytest.raises(ValueError, match="holds 14 packed layers and the model 0"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_fixed_point_is_one_stage(tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data)
    small = trainer.compress(FixedPointConfig(bits=8), CompressionArguments(stage_epochs=0))
    assert [record["stage"] for record in trainer.compression_history] == ["dense", "all"]
    assert any(True for _ in packed_layers(small))


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_other_architectures(tmp_path, parity_data, name):
    data = parity_data
    if name == "gpt2":
        data = parity_data.map(lambda row: {"labels": row["input_ids"]})
    trainer = make_trainer(tmp_path, data, model=name)
    trainer.compute_metrics = None
    small = trainer.compress(CONFIG)
    small.save_pretrained(tmp_path / "small")
    again = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    ids = torch.tensor(data["input_ids"][:4])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)


# ---- refusals ------------------------------------------------------------------------------------


def test_bad_calls_are_refused(tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data)
    with pytest.raises(TypeError, match="compress takes an IPQConfig"):
        trainer.compress({"block_size": 4})
    with pytest.raises(ValueError, match="block_size=7"):
        trainer.compress(IPQConfig(block_size=7))
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="no train_dataset.*stage_epochs=0"):
        trainer.compress(CONFIG)
    assert not any(True for _ in packed_layers(trainer.model))
    trainer.compress(CONFIG, CompressionArguments(stage_epochs=0))
    with pytest.raises(ValueError, match="already quantized"):
        trainer.compress(CONFIG, CompressionArguments(stage_epochs=0))
    with pytest.raises(TypeError, match="qn_config is a dict"):
        QuantNoiseTrainer(make_model("bert"), trainer.args, {"p": 0.1})


@pytest.mark.parametrize(
    "fields",
    [
        {"stage_epochs": -1},
        {"temperature": 0},
        {"distill_weight": 1.5},
        {"stage_learning_rate": 0.0},
        {"codebook_learning_rate": -1e-3},
    ],
)
def test_bad_compression_arguments_are_named(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name}="):
        CompressionArguments(**fields)


# ---- layers shared and taken out (7.9) -----------------------------------------------------------


def test_layers_are_shared_and_pruned_before_the_first_stage(tmp_path, parity_data):
    noise = QuantNoiseConfig(p=0.1, block_size=4, share_layers=2, layerdrop=0.2)
    trainer = make_trainer(tmp_path, parity_data, noise, model=make_stacked("bert", 6))
    trainer.train()
    config = IPQConfig(block_size=4, n_centroids=16, prune_layers="every_other")
    small = trainer.compress(config)
    assert small.config.num_hidden_layers == 4
    history = {record["stage"]: record for record in trainer.compression_history}
    assert list(history) == ["dense", "restructured", "ffn", "embeddings", "attention"]
    # Of three chunks the second goes, and two hold the weights of one layer each: a third is left.
    dense = trainer.model.bert.encoder.layer
    assert dense[1].attention.self.query.bias is dense[0].attention.self.query.bias
    stacks = history["dense"]["mb"] - history["restructured"]["mb"]
    layer = 4e-6 * sum(p.numel() for p in make_stacked("bert", 1).bert.encoder.parameters())
    assert stacks == pytest.approx(4 * layer, rel=0.06)  # names in the file's header beside them
    assert history["restructured"]["metric"]["eval_loss"] > 0
    shared = small.config.quantization_config.shared_layers
    assert shared == {
        "bert.encoder.layer.1": "bert.encoder.layer.0",
        "bert.encoder.layer.3": "bert.encoder.layer.2",
    }
    small.save_pretrained(tmp_path / "small")
    again = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        expected = small(**inputs_of("bert")).logits
        assert torch.equal(again(**inputs_of("bert")).logits, expected)


def test_the_teacher_is_the_whole_model(tmp_path, parity_data, monkeypatch):
    trainer = make_trainer(tmp_path, parity_data, model=make_stacked("bert", 4))
    seen = []
    original = Teacher.outputs

    def outputs(self, *batch):
        seen.append(original(self, *batch)["logits"])
        return {"logits": seen[-1]}

    monkeypatch.setattr(Teacher, "outputs", outputs)
    whole = copy.deepcopy(trainer.model).eval()
    trainer.compress(IPQConfig(**_fields(prune_layers="every_other", stages=["ffn"])))
    ids = torch.tensor(parity_data[:]["input_ids"])
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
    for logits in seen[0]:
        assert any(torch.allclose(logits, one, atol=1e-6) for one in expected)
