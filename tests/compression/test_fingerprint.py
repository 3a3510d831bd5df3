"""A pass goes on with the settings it was begun with, those of training among them."""

import json

import pytest
import torch
from support.stage_runs import make_pass_trainer
from support.tiny import make_model
from torch.nn.functional import cross_entropy

from hf_quantnoise import CompressionArguments, IPQConfig
from hf_quantnoise.compression.fingerprint import require_same_settings

CONFIG = IPQConfig(block_size=4, n_centroids=16, stages=["ffn"])
NOT_TRAINED = CompressionArguments(stage_epochs=0)


def loss_of_mine(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels)


@pytest.fixture(scope="module")
def begun(tmp_path_factory, parity_data):
    folder = tmp_path_factory.mktemp("begun")
    resume(folder, parity_data)
    return folder


def resume(folder, data, parts=None, **changes):
    parts = {"eval_dataset": None, **(parts or {})}
    changes = {"save_strategy": "steps", **changes}
    trainer = make_pass_trainer(folder, make_model("bert"), data, None, parts, **changes)
    return trainer.compress(CONFIG, NOT_TRAINED, resume_from_checkpoint=True)


CHANGES = {
    "learning_rate": (0.001, 0.05),
    "seed": (42, 7),
    "data_seed": (None, 3),
    "label_smoothing_factor": (0.0, 0.5),
    "weight_decay": (0.0, 0.1),
    "max_grad_norm": (1.0, 0.5),
    "adam_beta2": (0.999, 0.98),
    "lr_scheduler_type": ("linear", "cosine"),
    "lr_scheduler_kwargs": (None, {"num_cycles": 2}),
    "warmup_steps": (0, 5),
    "optim": ("adamw_torch_fused", "sgd"),
    "train_sampling_strategy": ("random", "sequential"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_training_is_done_with_is_compared(name, begun, parity_data):
    was, now = CHANGES[name]
    with pytest.raises(ValueError) as error:
        resume(begun, parity_data, **{name: now})
    message = str(error.value)
    assert f"was begun with {name}={was!r}, now it is {now!r}; take the same Tra" in message


def test_the_precision_and_what_a_trainer_is_given_are_compared(begun, parity_data):
    with pytest.raises(
        ValueError, match=r"begun with mixed precision \(bf16, fp16\)='no', now i.*'bf1"
    ):
        resume(begun, parity_data, bf16=True)
    with pytest.raises(ValueError, match=r"_kwargs=None, now it is \['SGD', {'lr': 0.001}\]; take"):
        optimizer = (torch.optim.SGD, {"lr": 1e-3})
        resume(begun, parity_data, {"optimizer_cls_and_kwargs": optimizer})
    with pytest.raises(ValueError, match="compute_loss_func=None, now it is 'loss_of_mine'"):
        resume(begun, parity_data, {"compute_loss_func": loss_of_mine})


def test_all_that_differs_is_named(begun, parity_data):
    words = "begun with learning_rate=0.001, now it is 0.1, and with seed=42, now it is 1; take"
    with pytest.raises(ValueError, match=words):
        resume(begun, parity_data, learning_rate=0.1, seed=1)


def test_batches_count_by_the_examples_of_a_step(begun, parity_data):
    """How they are dealt out among processes and accumulation may change."""
    with pytest.raises(ValueError, match="processes . gradient_accumulation_steps=16, now it is 8"):
        resume(begun, parity_data, per_device_train_batch_size=8)
    resume(begun, parity_data, per_device_train_batch_size=8, gradient_accumulation_steps=2)


def test_what_changes_no_model_may_change(begun, parity_data):
    resume(begun, parity_data, logging_steps=3, save_steps=7, num_train_epochs=9, run_name="again")


def test_a_pass_of_a_release_that_compared_less_goes_on(begun, parity_data, tmp_path):
    asked = {"config": CONFIG.to_dict()}
    now = {**asked, "TrainingArguments": {"seed": 1}}
    require_same_settings(asked, now, "folder")
    stored = json.loads((begun / "compression" / "stage-1" / "stage.json").read_text())["asked"]
    assert stored["TrainingArguments"]["seed"] == 42
