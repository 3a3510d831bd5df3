"""Statistics of BatchNorm in training with noise: evaluations, checkpoints, resumed runs, ranks."""

import logging
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from support.norms import IMAGES, assert_stats_of
from support.processes import needs_gloo, torchrun
from support.tiny import make_vision_model
from support.trainers import Rows, make_trainer, training_arguments
from torch import nn
from torch.utils.data import IterableDataset, default_collate
from transformers import Trainer, TrainerCallback

from hf_quantnoise import QuantNoiseCallback, QuantNoiseConfig, remove_quant_noise

NOISE = QuantNoiseConfig(noise="int4", p=0.5)


def train(folder, noise=NOISE, collate=None, **arguments):
    """Train a tiny ResNet for 4 steps of all examples; return the trainer."""
    settings = {"num_train_epochs": 4, "learning_rate": 2e-3, "seed": 1, **arguments}
    trainer = make_trainer(
        folder, make_vision_model("resnet"), Rows(IMAGES), noise,
        parts={"data_collator": collate, "eval_dataset": Rows(IMAGES)}, **settings,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_training_with_noise_ends_with_statistics_of_original_weights(tmp_path):
    trainer = train(tmp_path)
    assert_stats_of(remove_quant_noise(trainer.model))
    off = train(tmp_path, QuantNoiseConfig(noise="int4", p=0.5, batch_norm_batches=0))
    with pytest.raises(AssertionError):
        assert_stats_of(remove_quant_noise(off.model))


def test_evaluations_and_checkpoints_of_stock_trainer_use_original_weights(tmp_path):
    losses = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            dense = remove_quant_noise(deepcopy(model))
            assert_stats_of(dense)
            with torch.no_grad():
                losses.append((metrics["eval_loss"], float(dense.eval()(**IMAGES).loss)))

    model = make_vision_model("resnet")
    args = training_arguments(
        tmp_path, num_train_epochs=4, eval_strategy="epoch", save_strategy="steps", save_steps=3
    )
    callbacks = [QuantNoiseCallback(NOISE), Watch()]
    data = Rows(IMAGES)
    Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks).train()
    assert len(losses) == 4
    assert all(math.isclose(one, other, rel_tol=1e-5) for one, other in losses)
    for step in (3, 4):
        assert_stats_of(type(model).from_pretrained(tmp_path / f"checkpoint-{step}"))


def augment(rows):
    """Return a batch with random values in place of some pixels."""
    batch = default_collate(rows)
    batch["pixel_values"] = F.dropout(batch["pixel_values"], 0.1)
    return batch


def test_measuring_does_not_change_training(tmp_path):
    settings = {"per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    runs = [
        train(tmp_path, QuantNoiseConfig(noise="int4", p=0.5, batch_norm_batches=n), augment,
              **settings)
        for n in (0, 3)
    ]  # fmt: skip
    for key, value in runs[0].model.named_parameters():
        assert torch.equal(value, runs[1].model.get_parameter(key)), key


def test_resumed_training_ends_with_same_statistics(tmp_path):
    settings = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 6}
    uninterrupted = train(tmp_path, **settings).model.state_dict()
    trainer = make_trainer(
        tmp_path, make_vision_model("resnet", seed=7), Rows(IMAGES), NOISE,
        num_train_epochs=4, learning_rate=2e-3, seed=1, **settings,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, uninterrupted[key]), key


DDP_PROGRAM = """
import sys
from transformers import Trainer
import torch
import torch.distributed as dist
from support.tasks import TASKS
from support.tiny import make_vision_model
from support.trainers import Rows, training_arguments
from hf_quantnoise import QuantNoiseCallback, QuantNoiseConfig, remove_quant_noise

model, data = make_vision_model("resnet"), Rows(TASKS["resnet"][1]())
args = training_arguments(sys.argv[1], num_train_epochs=4, ddp_backend="gloo", save_steps=2,
                          save_strategy="steps")
callback = QuantNoiseCallback(QuantNoiseConfig(noise="int4", p=0.5))
Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
assert dist.get_world_size() == 2
torch.save(remove_quant_noise(model).state_dict(), f"{sys.argv[1]}/{dist.get_rank()}.pt")
"""


@needs_gloo
@pytest.mark.slow
def test_ddp_training_ends_with_same_statistics_on_all_ranks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(DDP_PROGRAM)
    torchrun(program, str(tmp_path))
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    model = make_vision_model("resnet")
    model.load_state_dict(states[0])
    assert_stats_of(model)
    assert_stats_of(type(model).from_pretrained(tmp_path / "checkpoint-2"))


class NeedsWeights(nn.Module):
    """A model whose loss needs a key that the trainer adds."""

    def __init__(self):
        super().__init__()
        self.model = make_vision_model("resnet")

    def forward(self, pixel_values, labels, weights):
        return self.model(pixel_values=pixel_values, labels=labels)


def test_batch_that_the_model_cannot_run_is_refused_before_training(tmp_path):
    trainer = make_trainer(tmp_path, NeedsWeights(), Rows(IMAGES), NOISE)
    with pytest.raises(ValueError, match=r"invalid train_dataset.*set batch_norm_batches=0"):
        trainer.train()


class Stream(IterableDataset):
    """All images, one after the other, without a length."""

    def __iter__(self):
        return (Rows(IMAGES)[row] for row in range(len(IMAGES["labels"])))


class OnlyImages(nn.Module):
    """A model whose forward does not take all keys of a batch."""

    def __init__(self):
        super().__init__()
        self.model = make_vision_model("resnet")

    def forward(self, pixel_values, labels=None):
        return self.model(pixel_values=pixel_values, labels=labels)


def with_names(rows):
    """Return a batch with a key that the model does not take."""
    return {**default_collate(rows), "names": torch.arange(len(rows))}


class PopsNames(Trainer):
    """A trainer whose batches have a key that the model does not take."""

    def compute_loss(self, model, inputs, **kwargs):
        assert len(inputs.pop("names")) == len(inputs["labels"])
        return super().compute_loss(model, inputs, **kwargs)


def test_streamed_data_and_extra_keys_and_autocast(tmp_path):
    args = training_arguments(tmp_path, max_steps=4, bf16=True, remove_unused_columns=False)
    model = OnlyImages()
    PopsNames(model, args, with_names, Stream(), callbacks=[QuantNoiseCallback(NOISE)]).train()
    assert_stats_of(remove_quant_noise(model))


def test_best_model_has_statistics_of_its_weights(tmp_path):
    trainer = train(
        tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_global_step < trainer.state.global_step
    assert_stats_of(remove_quant_noise(trainer.model))
    with torch.no_grad():
        loss = float(trainer.model.eval()(**IMAGES).loss)
    assert math.isclose(loss, trainer.state.best_metric, rel_tol=1e-5)


def test_unknown_loader_is_a_warning(tmp_path, caplog):
    class Batches(Trainer):
        def get_train_dataloader(self):
            return [IMAGES, IMAGES]

    model = make_vision_model("resnet")
    args = training_arguments(tmp_path, max_steps=2)
    with caplog.at_level(logging.WARNING):
        Batches(model, args, callbacks=[QuantNoiseCallback(NOISE)]).train()
    assert "expected a DataLoader" in caplog.text
