"""Compression in stages: what is trained, distilled, recorded and refused."""

import copy

import numpy as np
import pytest
import torch
from support.stacked import logits, make_stacked
from support.stored import tensors_of
from support.tiny import make_model
from support.trainers import make_trainer, training_arguments

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
from hf_quantnoise.compression.training.loss_normalization import loss_reads_num_items
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import packed_layers

PQ = {"block_size": 4, "n_centroids": 16, "codebook_bits": 32, "leftover_bits": 32}
CONFIG = IPQConfig(**PQ)
FFN = IPQConfig(**PQ, stages=["ffn"])
NOT_TRAINED = CompressionArguments(stage_epochs=0)
SHORT = CompressionArguments(stage_steps=2)


def accuracy(prediction):
    predictions, labels = prediction
    return {"accuracy": float((np.argmax(predictions, -1) == labels).mean())}


def make_bert_trainer(tmp_path, data, noise=None, **arguments):
    return make_trainer(tmp_path, make_model("bert"), data, noise, **arguments)


def assert_only_indices_are_unchanged(model, before):
    after = tensors_of(model)
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]) == name.endswith("weight_indices"), name


def test_stages_follow_the_paper_and_are_recorded(tmp_path, parity_data, input_ids, capsys):
    parts = {"compute_metrics": accuracy, "eval_dataset": parity_data}
    trainer = make_bert_trainer(tmp_path / "run", parity_data, QuantNoiseConfig(p=0.1), parts=parts)
    model, reported = trainer.model, []
    trainer.train()
    small = trainer.compress(CONFIG, report=lambda record: reported.append(record.to_dict()))
    history = trainer.compression_history
    assert reported == history
    assert [record["stage"] for record in history] == ["dense", "ffn", "embeddings", "attention"]
    assert [record["layers"] for record in history] == [0, 4, 2, 8]
    sizes = [record["mb"] for record in history]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == pytest.approx(size_report(small).total.disk_bytes / 1e6)
    assert all("eval_accuracy" in record["metric"] for record in history)
    assert all(0 < record["relative_error"] < 1 for record in history[1:])
    printed = capsys.readouterr().out.splitlines()
    for stage in ("dense", "ffn", "embeddings", "attention"):
        assert any(line.startswith(stage) and "MB" in line for line in printed)
    # The result is the model itself, in eval mode, and can be saved.
    assert small is model is trainer.model and not small.training
    small.save_pretrained(tmp_path / "small")
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, small(input_ids).logits)


def test_finetuning_changes_everything_but_the_codes(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path, parity_data)
    one_shot = quantize_model(copy.deepcopy(trainer.model), FFN, progress=False)
    trainer.compress(FFN, SHORT)
    assert_only_indices_are_unchanged(trainer.model, tensors_of(one_shot))


def test_zero_epochs_equal_quantize_model(tmp_path, parity_data, input_ids):
    trainer = make_bert_trainer(tmp_path, parity_data)
    expected = quantize_model(copy.deepcopy(trainer.model), CONFIG, progress=False)
    trainer.train_dataset = None
    small = trainer.compress(CONFIG, NOT_TRAINED)
    with torch.no_grad():
        assert torch.equal(small(input_ids).logits, expected(input_ids).logits)


def test_fixed_point_has_one_stage(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path, parity_data)
    small = trainer.compress(FixedPointConfig(bits=8), NOT_TRAINED)
    assert [record["stage"] for record in trainer.compression_history] == ["dense", "all"]
    assert any(True for _ in packed_layers(small))


# ---- teacher and labels --------------------------------------------------------------------------


def test_the_student_agrees_with_its_teacher(tmp_path, parity_data):
    """The labels are inverted, so that agreement can come from the teacher only."""
    trainer = make_bert_trainer(tmp_path, parity_data, num_train_epochs=8)
    trainer.train()
    teacher = copy.deepcopy(trainer.model).eval()
    trainer.train_dataset = parity_data.map(lambda row: {"labels": 1 - row["labels"]})
    small = trainer.compress(
        CONFIG, CompressionArguments(stage_epochs=3, codebook_learning_rate=2e-3)
    )
    ids = torch.tensor(parity_data["input_ids"])
    with torch.no_grad():
        agreement = (small(ids).logits.argmax(-1) == teacher(ids).logits.argmax(-1)).float().mean()
    assert agreement > 0.8


def test_a_given_teacher_is_used_and_not_changed(tmp_path, parity_data):
    teacher = make_model("bert", seed=5).train()
    before = copy.deepcopy(teacher.state_dict())
    calls = []
    teacher.register_forward_hook(
        lambda module, *_: calls.append(torch.is_grad_enabled() or module.training)
    )
    make_bert_trainer(tmp_path, parity_data).compress(CONFIG, SHORT, teacher=teacher)
    # One batch for the check, then three stages of two steps.
    assert len(calls) == 1 + 3 * 2 and not any(calls)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_copy_of_a_teacher_can_be_trained(tmp_path, parity_data):
    teacher = make_model("bert", seed=5)
    parts = {"teacher": teacher}
    make_trainer(tmp_path, make_model("bert"), parity_data, parts=parts, max_steps=1).train()
    student = copy.deepcopy(teacher)
    before = copy.deepcopy(student.state_dict())
    make_trainer(tmp_path, student, parity_data, parts=parts, max_steps=1).train()
    assert not all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_the_teacher_is_the_model_before_pruning(tmp_path, parity_data, monkeypatch):
    trainer = make_trainer(tmp_path, make_stacked("bert", 4), parity_data)
    outputs, original = [], Teacher.outputs

    def keep(self, *batch):
        outputs.append(original(self, *batch)["logits"])
        return {"logits": outputs[-1]}

    monkeypatch.setattr(Teacher, "outputs", keep)
    dense = copy.deepcopy(trainer.model).eval()
    config = IPQConfig(**PQ, prune_layers="every_other", stages=["ffn"])
    trainer.compress(config, CompressionArguments(stage_steps=1))
    with torch.no_grad():
        expected = dense(input_ids=torch.tensor(parity_data[:]["input_ids"])).logits
    for row in outputs[0]:
        assert any(torch.allclose(row, each, atol=1e-6) for each in expected)


@pytest.mark.parametrize("distill", [True, False])
def test_gradient_accumulation_does_not_multiply_the_loss(tmp_path, parity_data, distill):
    losses = []
    for steps in (1, 2, 4):
        trainer = make_bert_trainer(
            tmp_path, parity_data, learning_rate=1e-8, gradient_accumulation_steps=steps,
            per_device_train_batch_size=16 // steps,
        )  # fmt: skip
        trainer.compress(FFN, CompressionArguments(distill=distill, distill_weight=0.5))
        losses.append(trainer.compression_history[-1]["finetuning"]["train_loss"])
    assert losses[0] > 0
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.05)


@pytest.mark.parametrize(("name", "reads"), [("gpt2", True), ("bert", False)])
def test_heads_that_read_num_items_in_batch_are_recognized(name, reads, tmp_path, parity_data):
    model = make_model(name)
    assert loss_reads_num_items(model) is reads
    assert make_trainer(tmp_path, model, parity_data).model_accepts_loss_kwargs is reads


# ---- training of packed models -------------------------------------------------------------------


def test_centroids_have_their_own_rate_and_no_weight_decay(tmp_path):
    model = quantize_model(make_model("bert"), CONFIG, progress=False)
    args = training_arguments(tmp_path, weight_decay=0.1)
    trainer = StageTrainer(
        model, args, compression_args=CompressionArguments(codebook_learning_rate=5e-4)
    )
    codebooks = {id(layer.weight_codebook) for _, layer in packed_layers(model)}
    seen = 0
    for group in trainer.create_optimizer().param_groups:
        in_group = [p for p in group["params"] if id(p) in codebooks]
        seen += len(in_group)
        if in_group:
            assert len(in_group) == len(group["params"])
            assert (group["lr"], group["weight_decay"]) == (5e-4, 0.0)
    assert seen == len(codebooks)
    assert not any("weight_" in name for name in trainer.get_decay_parameter_names(model))


def test_training_continues_after_compression_and_after_loading(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path / "a", parity_data, QuantNoiseConfig(p=0.1))
    small = trainer.compress(CONFIG, NOT_TRAINED)
    small.save_pretrained(tmp_path / "small")
    for model in (small, AutoQuantizedModel.from_pretrained(tmp_path / "small")):
        before = {name: p.detach().clone() for name, p in tensors_of(model).items()}
        make_trainer(tmp_path / "b", model, parity_data, max_steps=2).train()
        assert_only_indices_are_unchanged(model, before)


def test_training_of_a_packed_model_resumes_exactly_and_a_dense_model_is_refused(
    tmp_path, parity_data
):
    settings = {"save_strategy": "steps", "save_steps": 3}
    small = quantize_model(make_model("bert"), CONFIG, progress=False)
    uninterrupted, resumed = (
        make_trainer(tmp_path, copy.deepcopy(small), parity_data, **settings) for _ in range(2)
    )
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, parameter in tensors_of(resumed.model).items():
        assert torch.equal(parameter, uninterrupted.model.get_parameter(name)), name
    dense = make_bert_trainer(tmp_path, parity_data, **settings)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.*checkpoint-3.* 14 .* 0;"):
        dense.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_other_architectures_load_as_they_are_in_memory(tmp_path, parity_data, name):
    data = parity_data
    if name == "gpt2":
        data = parity_data.map(lambda row: {"labels": row["input_ids"]})
    small = make_trainer(tmp_path, make_model(name), data).compress(CONFIG, SHORT)
    small.save_pretrained(tmp_path / "small")
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    ids = torch.tensor(data["input_ids"][:4])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, small(ids).logits)


def test_layers_are_shared_and_pruned_before_the_first_stage(tmp_path, parity_data):
    noise = QuantNoiseConfig(p=0.1, block_size=4, share_layers=2, layerdrop=0.2)
    parts = {"eval_dataset": parity_data}
    trainer = make_trainer(tmp_path, make_stacked("bert", 6), parity_data, noise, parts=parts)
    trainer.train()
    small = trainer.compress(IPQConfig(**PQ, prune_layers="every_other"), SHORT)
    assert small.config.num_hidden_layers == 4
    history = {record["stage"]: record for record in trainer.compression_history}
    assert list(history) == ["dense", "restructured", "ffn", "embeddings", "attention"]
    # Of three pairs of layers the second is removed, and each other pair shares its weights: a
    # third of the stack is left.
    layers = trainer.model.bert.encoder.layer
    assert layers[1].attention.self.query.bias is layers[0].attention.self.query.bias
    saved = history["dense"]["mb"] - history["restructured"]["mb"]
    layer = 4e-6 * sum(p.numel() for p in make_stacked("bert", 1).bert.encoder.parameters())
    assert saved == pytest.approx(4 * layer, rel=0.06)  # the file's header has names, too
    assert history["restructured"]["metric"]["eval_loss"] > 0
    assert small.config.quantization_config.shared_layers == {
        "bert.encoder.layer.1": "bert.encoder.layer.0",
        "bert.encoder.layer.3": "bert.encoder.layer.2",
    }
    small.save_pretrained(tmp_path / "small")
    loaded = AutoQuantizedModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(logits(loaded), logits(small))


# ---- refusals ------------------------------------------------------------------------------------


def test_invalid_calls_are_refused(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path, parity_data)
    with pytest.raises(TypeError, match=r"config: got dict.*IPQConfig"):
        trainer.compress({"block_size": 4})
    with pytest.raises(ValueError, match=r"block_size.*7"):
        trainer.compress(IPQConfig(block_size=7))
    trainer.train_dataset = None
    with pytest.raises(ValueError, match=r"train_dataset=None.*stage_epochs=0"):
        trainer.compress(CONFIG)
    assert not any(True for _ in packed_layers(trainer.model))
    trainer.compress(CONFIG, NOT_TRAINED)
    with pytest.raises(ValueError, match="quantized"):
        trainer.compress(CONFIG, NOT_TRAINED)
    with pytest.raises(TypeError, match="qn_config: got dict"):
        QuantNoiseTrainer(make_model("bert"), trainer.args, {"p": 0.1})
    with pytest.raises(TypeError, match="'tokenizer'"):
        QuantNoiseTrainer(make_model("bert"), trainer.args, tokenizer=None)


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
def test_invalid_compression_arguments_are_named(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        CompressionArguments(**fields)
