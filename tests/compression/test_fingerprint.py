"""A run resumes with the settings it was started with, those of training included."""

import json

import pytest
import torch
from support.tiny import make_model
from support.trainers import make_trainer
from torch.nn.functional import cross_entropy

from hf_quantnoise import CompressionArguments, IPQConfig
from hf_quantnoise.compression.fingerprint import require_same_settings
from hf_quantnoise.files.durable import write_list

CONFIG = IPQConfig(block_size=4, n_centroids=16, stages=["ffn"])
NOT_TRAINED = CompressionArguments(stage_epochs=0)


def custom_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels)


@pytest.fixture(scope="module")
def started(tmp_path_factory, parity_data):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("started")
    resume(folder, parity_data)
    return folder


def resume(folder, data, parts=None, **changes):
    changes = {"save_strategy": "steps", **changes}
    trainer = make_trainer(folder, make_model("bert"), data, parts=parts, **changes)
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
    "optim": ("adamw_torch_fused", "sgd"),
    "train_sampling_strategy": ("random", "sequential"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_training_arguments_are_compared(name, started, parity_data):
    before, now = CHANGES[name]
    with pytest.raises(ValueError) as error:
        resume(started, parity_data, **{name: now})
    message = str(error.value)
    assert f"{name}={before!r} (now {now!r})" in message and "TrainingArguments" in message


def test_precision_and_parts_of_the_trainer_are_compared(started, parity_data):
    with pytest.raises(ValueError, match=r"bf16.*='no' \(now 'bf16'\)"):
        resume(started, parity_data, bf16=True)
    with pytest.raises(ValueError, match=r"_kwargs=None \(now \['SGD', {'lr': 0.001}\]\)"):
        optimizer = (torch.optim.SGD, {"lr": 1e-3})
        resume(started, parity_data, {"optimizer_cls_and_kwargs": optimizer})
    with pytest.raises(ValueError, match=r"compute_loss_func=None \(now 'custom_loss'\)"):
        resume(started, parity_data, {"compute_loss_func": custom_loss})


def test_all_differences_are_named(started, parity_data):
    with pytest.raises(ValueError, match=r"learning_rate=0.001 \(now 0.1\).*seed=42 \(now 1\)"):
        resume(started, parity_data, learning_rate=0.1, seed=1)


def test_the_examples_of_a_step_are_compared_not_how_they_are_split(started, parity_data):
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=16 \(now 8\)"):
        resume(started, parity_data, per_device_train_batch_size=8)
    resume(started, parity_data, per_device_train_batch_size=8, gradient_accumulation_steps=2)


def test_settings_without_influence_on_the_model_may_change(started, parity_data):
    resume(started, parity_data, logging_steps=3, save_steps=7, num_train_epochs=9, run_name="b")
    resume(started, parity_data, warmup_steps=5, max_steps=3)  # stages have their own


def test_parts_that_an_older_run_did_not_store_are_not_compared(started):
    require_same_settings({"config": {}}, {"config": {}, "TrainingArguments": {"seed": 1}}, "")
    stored = json.loads((started / "compression" / "stage-1" / "stage.json").read_text())["asked"]
    assert stored["TrainingArguments"]["seed"] == 42
    now = json.loads(json.dumps(stored))
    stored["TrainingArguments"]["warmup_steps"] = 5  # older runs stored it, without influence
    require_same_settings(stored, now, "")


def test_options_that_an_older_run_did_not_have_may_have_their_default(started):
    stored = json.loads((started / "compression" / "stage-1" / "stage.json").read_text())["asked"]
    now = json.loads(json.dumps(stored))
    added = ("random_tokens", "lookup_batches", "distill_weight")
    for name in added:
        del stored["compression_args"][name]
    require_same_settings(stored, now, "")
    for name, value in zip(added, (0.5, 7, 0.0), strict=True):
        changed = {**now, "compression_args": {**now["compression_args"], name: value}}
        with pytest.raises(ValueError, match=rf"{name}=None \(now {value}\)"):
            require_same_settings(stored, changed, "")
    now["TrainingArguments"]["optim_args"] = None  # of another release of transformers
    del stored["TrainingArguments"]["optim_args"]
    require_same_settings(stored, now, "")


def test_removed_options_of_an_older_run_have_no_effect(tmp_path, parity_data, caplog):
    resume(tmp_path, parity_data)
    path = tmp_path / "compression" / "stage-1" / "stage.json"
    content = json.loads(path.read_text())
    unused = {"reassign_steps": None, "reassign_share": 1e-4, "stage_schedule": "restart",
              "distill_cache": False}  # fmt: skip
    used = {"reassign_steps": 5, "stage_schedule": "continue", "distill_cache": True}
    for options in (unused, used):
        content["asked"]["compression_args"].update(options)
        path.write_text(json.dumps(content))
        write_list(path.parent)
        caplog.clear()
        resume(tmp_path, parity_data)
        warned = [text for text in caplog.messages if "no effect" in text]
        assert len(warned) == (len(used) if options is used else 0)
    assert "reassign_steps=5" in warned[0]
