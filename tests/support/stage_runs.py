"""Short passes, what they log, and killed ones that go on."""

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import IPQConfig, QuantNoiseTrainer
from hf_quantnoise.compression.checkpoints import in_memory_tensors
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


def settings(folder, **changes):
    """Training arguments of a run that writes and shows nothing."""
    return TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True,
        **{"per_device_train_batch_size": 32, "logging_strategy": "no", "save_strategy": "no",
           **changes},
    )  # fmt: skip


def make_pass_trainer(folder, model, data, noise=None, parts=None, **arguments):
    """A trainer for a short pass: one epoch, nothing written or shown.

    Args:
        parts: further keyword arguments of the trainer; by default it evaluates on ``data``.
        arguments: of ``TrainingArguments``.
    """
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    parts = {"eval_dataset": data, **(parts or {})}
    args = TrainingArguments(**settings)
    return QuantNoiseTrainer(model, args, noise, train_dataset=data, **parts)


def make_trainer(tmp_path, task="classification", model=None, data=None, **arguments):
    """A trainer for a pass over one of the tasks, without evaluation."""
    make, batch = TASKS[task]
    settings = {"per_device_train_batch_size": 8, "learning_rate": 2e-3, "logging_steps": 1}
    settings |= {"num_train_epochs": 3, **arguments}
    model = make() if model is None else model
    data = Rows(batch()) if data is None else data
    return make_pass_trainer(tmp_path, model, data, parts={"eval_dataset": None}, **settings)


# ---- passes that are killed ----------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: nobody may catch it."""


def tensors(model):
    return {name: tensor.clone() for name, tensor in in_memory_tensors(model).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def spoilt(model):
    """The same structure with other weights: a resumed process has what it has."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def compare(again, straight):
    """Two trainers after their passes: one model, one config, one history."""
    assert_same(tensors(again.model), tensors(straight.model))
    one, other = (each.model.config.quantization_config for each in (again, straight))
    assert one.to_dict() == other.to_dict()
    for one, other in zip(again.compression_history, straight.compression_history, strict=True):
        for key in ("stage", "layers", "mb", "relative_error"):
            assert one[key] == other[key]
        for key in ("metric", "packed_metric"):
            assert one[key].get("eval_loss") == other[key].get("eval_loss")


def sharp(model):
    """Without dropout, and with weights large enough for layers to say something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.weight *= 4.0
    return model


class Watch:
    """Keeps all that stage trainers log."""

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
        return [log[key] for log in self.logs if key in log]
