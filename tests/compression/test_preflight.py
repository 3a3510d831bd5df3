"""What a trainer was given reaches the trainers of the stages, or is refused before they begin."""

import pytest
import torch
from support.stage_runs import make_pass_trainer, settings
from support.tiny import make_model
from torch.nn.functional import cross_entropy

from hf_quantnoise import CompressionArguments, FixedPointConfig, IPQConfig, QuantNoiseTrainer
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.modeling import packed_layers

CONFIG = IPQConfig(block_size=4, n_centroids=16, stages=["ffn", "attention"])
SGD = (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9})


def make_trainer(folder, data, kind=QuantNoiseTrainer, **parts):
    return kind(make_model("bert"), settings(folder), None, train_dataset=data, **parts)


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizer of each stage, as it is when its schedule is made."""
    seen, real = [], StageTrainer.create_scheduler

    def watched(trainer, *args, **kwargs):
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        rates = {group["lr"] for group in optimizer.param_groups}
        seen.append((type(optimizer), optimizer.defaults.get("momentum"), rates))
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "create_scheduler", watched)
    return seen


def test_the_class_of_the_optimizer_is_that_of_the_run(tmp_path, parity_data, optimizers):
    trainer = make_trainer(tmp_path, parity_data, optimizer_cls_and_kwargs=SGD)
    stages = {"attention": {"epochs": 1, "learning_rate": 5e-4, "codebook_learning_rate": 1e-2}}
    trainer.compress(CONFIG, CompressionArguments(stage_settings=stages))
    first, second = optimizers
    assert first == (torch.optim.SGD, 0.9, {1e-3})
    assert second == (torch.optim.SGD, 0.9, {5e-4, 1e-2})
    assert SGD[1] == {"lr": 1e-3, "momentum": 0.9}


def test_an_optimizer_of_the_dense_model_is_refused(tmp_path, parity_data):
    model = make_model("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = QuantNoiseTrainer(
        model, settings(tmp_path, max_steps=1), train_dataset=parity_data,
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    with pytest.raises(ValueError, match=r"optimizers=\(SGD, None\).*optimizer_cls_and_kwargs="):
        trainer.compress(CONFIG)
    assert not any(packed_layers(trainer.model))
    # The ways out that the message names.
    trainer.compress(FixedPointConfig(), CompressionArguments(stage_epochs=0))


def test_parameters_among_the_optimizer_s_arguments_are_refused(tmp_path, parity_data):
    model = make_model("bert")
    given = (torch.optim.SGD, {"lr": 1e-3, "params": list(model.parameters())})
    trainer = QuantNoiseTrainer(
        model, settings(tmp_path, max_steps=1), train_dataset=parity_data,
        optimizer_cls_and_kwargs=given,
    )  # fmt: skip
    trainer.train()  # takes them out of the dict
    with pytest.raises(ValueError, match=r"optimizer_cls_and_kwargs=\(SGD, {'params': ...}\)"):
        trainer.compress(CONFIG)


def test_a_trainer_that_has_trained_has_no_optimizer_of_the_user_s(tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data)
    trainer.args.max_steps = 1
    trainer.train()
    trainer.compress(CONFIG, CompressionArguments(stage_steps=1))


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_wait_for_evaluations_are_refused(name, tmp_path, parity_data):
    trainer = make_pass_trainer(
        tmp_path, make_model("bert"), parity_data, lr_scheduler_type=name, eval_strategy="epoch"
    )
    arguments = CompressionArguments(stage_steps=1)
    with pytest.raises(ValueError, match=f"lr_scheduler_type='{name}' goes by evaluations"):
        trainer.compress(CONFIG, arguments)
    assert not any(packed_layers(trainer.model))
    trainer.args.lr_scheduler_type = "linear"
    trainer.compress(CONFIG, arguments)


def subclass(name):
    """A trainer with a method of its own that does what the stock one does."""

    def method(self, *args, **kwargs):
        return getattr(super(Mine, self), name)(*args, **kwargs)

    Mine = type("Mine", (QuantNoiseTrainer,), {name: method})
    return Mine


OWN = {
    "get_train_dataloader": ({}, "train_dataset and data_collator"),
    "_get_train_sampler": ({}, "train_sampling_strategy"),
    "create_optimizer": ({}, "optimizer_cls_and_kwargs"),
    "create_scheduler": ({}, "lr_scheduler_type"),
    "training_step": ({}, "compute_loss_func"),
    "compute_loss": ({"distill_weight": 0.5}, "compute_loss_func"),
    "prediction_step": ({"stage_epochs": 0}, "eval_dataset=None"),
    "evaluate": ({"stage_epochs": 0}, "eval_dataset=None"),
}


@pytest.mark.parametrize("name", OWN)
def test_methods_of_a_subclass_that_no_stage_would_call_are_refused(name, tmp_path, parity_data):
    fields, words = OWN[name]
    trainer = make_trainer(tmp_path, parity_data, subclass(name), eval_dataset=parity_data)
    with pytest.raises(ValueError, match=f"Mine.{name}: each stage.*{words}"):
        trainer.compress(CONFIG, CompressionArguments(**fields))
    assert not any(packed_layers(trainer.model))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("compute_loss", {"stage_steps": 1}),  # the teacher's logits alone are learnt
        ("create_optimizer", {"stage_epochs": 0}),
        ("get_train_dataloader", {"stage_epochs": 0}),
        ("prediction_step", {"stage_steps": 1}),  # nothing is evaluated
        ("log", {"stage_steps": 1}),
    ],
)
def test_methods_that_a_pass_does_not_need_are_the_user_s_own(name, fields, tmp_path, parity_data):
    trainer = make_trainer(tmp_path, parity_data, subclass(name))
    trainer.compress(CONFIG, CompressionArguments(**fields))


def test_the_loss_function_is_that_of_the_run(tmp_path, parity_data):
    calls = []

    def loss(outputs, labels, num_items_in_batch=None):
        calls.append(len(labels))
        return cross_entropy(outputs.logits, labels)

    trainer = make_trainer(tmp_path, parity_data, compute_loss_func=loss)
    trainer.compress(CONFIG, CompressionArguments(stage_steps=2, distill=False))
    assert sum(calls) == 2 * 2 * 32


def test_epochs_of_data_of_unknown_length_are_refused_before_anything_is_packed(
    tmp_path, parity_data
):
    streamed = parity_data.to_iterable_dataset()
    trainer = QuantNoiseTrainer(
        make_model("bert"), settings(tmp_path, max_steps=2), train_dataset=streamed
    )
    for arguments in (
        CompressionArguments(),
        CompressionArguments(stage_steps=1, stage_settings={"attention": {"epochs": 1}}),
    ):
        with pytest.raises(ValueError, match=r"IterableDataset.*set CompressionArguments\(stage_s"):
            trainer.compress(CONFIG, arguments)
        assert not any(packed_layers(trainer.model))
    # The way out that the message names.
    stages = {"ffn": {"steps": 1}, "attention": {"epochs": 0}}
    trainer.compress(CONFIG, CompressionArguments(stage_settings=stages))
