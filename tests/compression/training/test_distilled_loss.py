"""Distillation with the user's ``compute_loss_func`` for the labels."""

import copy

import pytest
from accelerate import Accelerator
from support.tasks import EXAMPLES, TASKS
from support.trainers import ONE_STAGE, Rows, make_trainer
from torch.nn.functional import cross_entropy

from hf_quantnoise import CompressionArguments

ARGS = CompressionArguments(distill_weight=0.5, stage_epochs=1)


def shifted(outputs, labels):
    logits = outputs["logits"]
    if labels.dim() > 1:  # of next tokens
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return logits, labels


def counted(outputs, labels, num_items_in_batch=None):
    total = cross_entropy(*shifted(outputs, labels), reduction="sum")
    return total / num_items_in_batch


def mean(outputs, labels, num_items_in_batch=None):
    return cross_entropy(*shifted(outputs, labels))


def run(folder, task, loss, compresses, **arguments):
    """Return the loss of the first step of a training, or of a stage."""
    make, batch = TASKS[task]
    model, batch = make(), batch()
    if batch["labels"].dim() > 1:
        batch["labels"][:, 0] = -100  # never predicted, but counted for some models
    parts = {"compute_loss_func": loss, "compression_args": ARGS}
    parts["teacher"] = copy.deepcopy(model)
    settings = {"max_steps": 1, "logging_steps": 1, "optim": "sgd", **arguments}
    trainer = make_trainer(folder, model, Rows(batch), parts=parts, **settings)
    if not compresses:
        return trainer.train().training_loss
    trainer.compress(ONE_STAGE)
    return trainer.compression_history[-1]["finetuning"]["train_loss"]


@pytest.mark.parametrize("compresses", [False, True])
@pytest.mark.parametrize("task", ["classification", "causal LM"])
def test_loss_function_gets_the_count_of_its_batch(task, compresses, tmp_path):
    losses = [
        run(tmp_path, task, loss, compresses, per_device_train_batch_size=EXAMPLES // steps,
            gradient_accumulation_steps=steps)
        for loss in (None, mean, counted)
        for steps in (1, 2)
    ]  # fmt: skip
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.02)


@pytest.mark.parametrize("loss", [mean, counted])
def test_loss_function_is_not_scaled_by_the_number_of_processes(loss, tmp_path, monkeypatch):
    losses = []
    for processes in (1, 2):
        monkeypatch.setattr(Accelerator, "num_processes", property(lambda _, n=processes: n))
        make, batch = TASKS["classification"]
        model = make()
        parts = {"compute_loss_func": loss, "compression_args": ARGS,
                 "teacher": copy.deepcopy(model)}  # fmt: skip
        trainer = make_trainer(tmp_path, model, Rows(batch()), parts=parts)
        assert trainer.args.average_tokens_across_devices
        losses.append(trainer.compute_loss(model.train(), batch()).item())
        assert trainer.args.average_tokens_across_devices
    assert losses[0] == losses[1] > 0
