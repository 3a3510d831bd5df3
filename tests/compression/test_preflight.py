"""Arguments of the user's trainer are passed on to the stages, or refused before they start."""

import pytest
import torch
from support.tiny import make_model
from support.trainers import make_trainer
from torch.nn.functional import cross_entropy

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
)
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import packed_layers

CONFIG = IPQConfig(block_size=4, n_centroids=16, stages=["ffn", "attention"])
SGD = (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9})
NOT_TRAINED = CompressionArguments(stage_epochs=0)
ONE_STEP = CompressionArguments(stage_steps=1)


def make_bert_trainer(folder, data, cls=QuantNoiseTrainer, model=None, parts=None, **changes):
    model = model or make_model("bert")
    return make_trainer(folder, model, data, None, cls, parts, **changes)


def assert_refused(trainer, match, arguments=None):
    """Assert that compression raises before anything is packed."""
    with pytest.raises(ValueError, match=match):
        trainer.compress(CONFIG, arguments)
    assert not any(packed_layers(trainer.model))


def test_stages_use_the_optimizer_class_of_the_trainer(tmp_path, parity_data, monkeypatch):
    seen, real = [], StageTrainer.create_scheduler

    def watched(trainer, *args, **kwargs):
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        rates = {group["lr"] for group in optimizer.param_groups}
        seen.append((type(optimizer), optimizer.defaults.get("momentum"), rates))
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "create_scheduler", watched)
    trainer = make_bert_trainer(tmp_path, parity_data, parts={"optimizer_cls_and_kwargs": SGD})
    settings = {"attention": {"steps": 1, "learning_rate": 5e-4, "codebook_learning_rate": 1e-2}}
    trainer.compress(CONFIG, CompressionArguments(stage_steps=1, stage_settings=settings))
    assert seen == [
        (torch.optim.SGD, 0.9, {1e-3}),
        (torch.optim.SGD, 0.9, {5e-4, 1e-2}),
    ]
    assert SGD[1] == {"lr": 1e-3, "momentum": 0.9}


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluations_that_convert_the_model_are_refused(name, tmp_path, parity_data):
    """Trainer converts the model itself, so that stages would train 16-bit weights."""
    parts = {"eval_dataset": parity_data}
    trainer = make_bert_trainer(tmp_path, parity_data, parts=parts, **{name: True})
    assert_refused(trainer, rf"invalid {name}=True: .* set {name}=False", ONE_STEP)
    assert {each.dtype for each in trainer.model.parameters()} == {torch.float32}


def test_an_optimizer_of_the_dense_model_is_refused(tmp_path, parity_data):
    model = make_model("bert")
    parts = {"optimizers": (torch.optim.SGD(model.parameters(), lr=1e-3), None)}
    trainer = make_bert_trainer(tmp_path, parity_data, model=model, parts=parts, max_steps=1)
    trainer.train()
    assert_refused(trainer, r"optimizers=\(SGD, None\).*optimizer_cls_and_kwargs=")
    # The alternatives that the message names.
    trainer.compress(FixedPointConfig(), NOT_TRAINED)


def test_parameters_in_the_optimizer_arguments_are_refused(tmp_path, parity_data):
    model = make_model("bert")
    kwargs = {"lr": 1e-3, "params": list(model.parameters())}
    parts = {"optimizer_cls_and_kwargs": (torch.optim.SGD, kwargs)}
    trainer = make_bert_trainer(tmp_path, parity_data, model=model, parts=parts, max_steps=1)
    trainer.train()  # removes them from the dict
    assert_refused(trainer, r"optimizer_cls_and_kwargs=\(SGD, {'params': ...}\)")


def test_an_optimizer_that_the_trainer_created_is_accepted(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path, parity_data, max_steps=1)
    trainer.train()
    trainer.compress(CONFIG, ONE_STEP)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_evaluations_are_refused(name, tmp_path, parity_data):
    trainer = make_bert_trainer(
        tmp_path, parity_data, parts={"eval_dataset": parity_data}, lr_scheduler_type=name,
        eval_strategy="epoch",
    )  # fmt: skip
    assert_refused(trainer, f"lr_scheduler_type='{name}'", ONE_STEP)
    trainer.args.lr_scheduler_type = "linear"
    trainer.compress(CONFIG, ONE_STEP)


def subclass(name):
    """Return a trainer class that overrides a method without changing it."""

    def method(self, *args, **kwargs):
        return getattr(super(Mine, self), name)(*args, **kwargs)

    Mine = type("Mine", (QuantNoiseTrainer,), {name: method})
    return Mine


OVERRIDDEN = {
    "get_train_dataloader": ({}, "train_dataset and data_collator"),
    "_get_train_sampler": ({}, "train_sampling_strategy"),
    "create_optimizer": ({}, "optimizer_cls_and_kwargs"),
    "create_scheduler": ({}, "lr_scheduler_type"),
    "training_step": ({}, "compute_loss_func"),
    "compute_loss": ({"distill_weight": 0.5}, "compute_loss_func"),
    "prediction_step": ({"stage_epochs": 0}, "eval_dataset=None"),
    "evaluate": ({"stage_epochs": 0}, "eval_dataset=None"),
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_methods_that_stages_do_not_call_are_refused(name, tmp_path, parity_data):
    fields, instead = OVERRIDDEN[name]
    parts = {"eval_dataset": parity_data}
    trainer = make_bert_trainer(tmp_path, parity_data, subclass(name), parts=parts)
    assert_refused(trainer, f"Mine.{name}.*{instead}", CompressionArguments(**fields))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("compute_loss", ONE_STEP),  # only the teacher's logits count
        ("create_optimizer", NOT_TRAINED),
        ("get_train_dataloader", NOT_TRAINED),
        ("prediction_step", ONE_STEP),  # nothing is evaluated
        ("log", ONE_STEP),
    ],
)
def test_overridden_methods_that_no_stage_needs_are_accepted(
    name, arguments, tmp_path, parity_data
):
    make_bert_trainer(tmp_path, parity_data, subclass(name)).compress(CONFIG, arguments)


def test_stages_use_the_loss_function_of_the_trainer(tmp_path, parity_data):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(len(labels))
        return cross_entropy(outputs.logits, labels)

    trainer = make_bert_trainer(tmp_path, parity_data, parts={"compute_loss_func": loss})
    trainer.compress(CONFIG, CompressionArguments(stage_steps=2, distill=False))
    assert sum(calls) == 2 * 2 * 16


def test_epochs_of_data_without_a_length_are_refused(tmp_path, parity_data):
    trainer = make_bert_trainer(tmp_path, parity_data.to_iterable_dataset(), max_steps=2)
    for arguments in (
        CompressionArguments(),
        CompressionArguments(stage_steps=1, stage_settings={"attention": {"epochs": 1}}),
    ):
        assert_refused(trainer, r"train_dataset=IterableDataset.*stage_steps=", arguments)
    # The alternative that the message names.
    settings = {"ffn": {"steps": 1}, "attention": {"epochs": 0}}
    trainer.compress(CONFIG, CompressionArguments(stage_settings=settings))


def test_model_without_trained_parameters_is_refused(tmp_path, parity_data):
    model = make_model("bert").requires_grad_(False)
    trainer = make_bert_trainer(tmp_path, parity_data, model=model)
    assert_refused(trainer, r"invalid model: all parameters are frozen.*stage_epochs=0")
    packed = trainer.compress(CONFIG, NOT_TRAINED)
    assert any(packed_layers(packed))


@pytest.mark.parametrize(
    ("p", "given", "arguments", "warns"),
    [
        (1.0, False, ONE_STEP, True),
        (0.5, False, ONE_STEP, False),
        (1.0, True, ONE_STEP, False),
        (1.0, False, NOT_TRAINED, False),
        (1.0, False, CompressionArguments(stage_steps=1, distill=False), False),
    ],
)
def test_a_teacher_of_latent_weights_is_warned_of(
    p, given, arguments, warns, tmp_path, parity_data, caplog
):
    noise = QuantNoiseConfig(noise="pq", p=p, block_size=4, n_centroids=16)
    trainer = make_trainer(tmp_path, make_model("bert"), parity_data, noise, max_steps=1)
    trainer.train()
    teacher = make_model("bert") if given else None
    trainer.compress(CONFIG, arguments, teacher=teacher)
    warnings = [text for text in caplog.messages if "noise of rate 1" in text]
    assert len(warnings) == warns


@pytest.mark.parametrize("of_trainer", [False, True])
def test_teacher_without_distillation_is_refused(of_trainer, tmp_path, parity_data):
    teacher = make_model("bert", 1)
    parts, passed = ({"teacher": teacher}, {}) if of_trainer else ({}, {"teacher": teacher})
    trainer = make_bert_trainer(tmp_path, parity_data, parts=parts)
    with pytest.raises(ValueError, match=r"distill=False, and a teacher is given; remove one"):
        trainer.compress(CONFIG, CompressionArguments(distill=False), **passed)
    assert not list(packed_layers(trainer.model))
    # Nothing is trained, so there is nothing to distill.
    trainer.compress(CONFIG, CompressionArguments(distill=False, stage_epochs=0), **passed)
