"""Short passes over the tasks, and what they log."""

import torch
from tasks import EXAMPLES, TASKS
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_quantnoise import IPQConfig, QuantNoiseTrainer
from hf_quantnoise.compression.stage_trainer import StageTrainer

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


def make_trainer(tmp_path, task="classification", model=None, data=None, **arguments):
    make, batch = TASKS[task]
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return QuantNoiseTrainer(
        make() if model is None else model,
        TrainingArguments(**settings),
        train_dataset=Rows(batch()) if data is None else data,
    )


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
