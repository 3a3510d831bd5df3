"""Trainers for short compression runs, what they log, and interrupted runs that are resumed."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import IPQConfig, QuantNoiseTrainer
from hf_quantnoise.compression.exact_checkpoints import in_memory_tensors
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from support.tasks import EXAMPLES, TASKS

ONE_STAGE = IPQConfig(block_size=8, n_centroids=4, stages=["ffn"])
ATTENTION = IPQConfig(block_size=4, n_centroids=8, stages=["attention"])
CONV = IPQConfig(block_size=4, n_centroids=8, stages=["conv"])


class Rows(Dataset):
    """Examples of a task; ``rows[i]`` is a dict of tensors."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, row):
        return {name: value[row] for name, value in self.batch.items()}


def training_arguments(folder, **changes):
    """Return arguments of one epoch on the CPU that writes and prints nothing."""
    settings = {
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return TrainingArguments(str(folder), **settings)


def make_trainer(folder, model, data, noise=None, cls=QuantNoiseTrainer, parts=None, **arguments):
    """Return a trainer for a short run, without evaluation.

    Args:
        folder: its ``output_dir``.
        model: the model.
        data: training data.
        noise: ``QuantNoiseConfig`` or None.
        cls: class of the trainer.
        parts: further keyword arguments of the trainer.
        arguments: of :func:`training_arguments`.
    """
    args = training_arguments(folder, **arguments)
    return cls(model, args, noise, train_dataset=data, **(parts or {}))


def make_task_trainer(folder, task="classification", model=None, data=None, **arguments):
    """Return a trainer for a short run on one of the tasks of ``support/tasks.py``."""
    make, batch = TASKS[task]
    settings = {"per_device_train_batch_size": 8, "learning_rate": 2e-3, "logging_steps": 1}
    settings |= {"num_train_epochs": 3, **arguments}
    model = make() if model is None else model
    return make_trainer(folder, model, Rows(batch()) if data is None else data, **settings)


# ---- interrupted runs ----------------------------------------------------------------------------


class Killed(BaseException):
    """Raised in place of a SIGKILL. Not an Exception, so that nothing catches it."""


@contextmanager
def interrupted_noise(step):
    """Interrupt a training with noise after its checkpoint of a step, and expect that."""
    save = QuantNoiseTrainer._save_checkpoint

    def stop(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        if trainer.qn_config is not None and trainer.state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(QuantNoiseTrainer, "_save_checkpoint", stop)
        yield


def tensors(model):
    """Return copies of a model's tensors."""
    return {name: tensor.clone() for name, tensor in in_memory_tensors(model).items()}


def assert_same(one, other):
    """Assert that two dicts of tensors are equal bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def with_other_weights(model):
    """Change the weights in place: a resumed process must not depend on those it starts with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def assert_same_result(resumed, uninterrupted):
    """Assert that two compressed trainers have the same model, config and history."""
    assert_same(tensors(resumed.model), tensors(uninterrupted.model))
    configs = [each.model.config.quantization_config for each in (resumed, uninterrupted)]
    assert configs[0].to_dict() == configs[1].to_dict()
    histories = resumed.compression_history, uninterrupted.compression_history
    for one, other in zip(*histories, strict=True):
        for key in ("stage", "layers", "mb", "relative_error"):
            assert one[key] == other[key]
        for key in ("metric", "packed_metric"):
            assert one[key].get("eval_loss") == other[key].get("eval_loss")


# ---- distillation --------------------------------------------------------------------------------


def sharp(model):
    """Remove dropout and enlarge the weights, so that each layer influences the output."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.weight *= 4.0
    return model


class StageLogs:
    """Collects what stage trainers log.

    Args:
        monkeypatch: the fixture of pytest.
    """

    def __init__(self, monkeypatch):
        self.logs, original = [], StageTrainer.log

        class Keep(TrainerCallback):
            def on_log(callback, args, state, control, logs=None, **kwargs):
                self.logs.append(dict(logs))

        def log(trainer, *args):
            if not any(isinstance(c, Keep) for c in trainer.callback_handler.callbacks):
                trainer.add_callback(Keep())
            return original(trainer, *args)

        monkeypatch.setattr(StageTrainer, "log", log)

    def of(self, key):
        """Return all values logged under a key."""
        return [log[key] for log in self.logs if key in log]
