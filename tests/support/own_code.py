"""A model of the user's code: a configuration and a modeling file in the folder of the model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

CONFIGURATION = """
from pathlib import Path
from transformers import PretrainedConfig

Path({mark!r}).write_text("configuration")


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=32, **kwargs):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)
"""
MODELING = """
from pathlib import Path
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from .configuration_own import OwnConfig

Path({mark!r}).write_text("modeling")


class OwnForSequenceClassification(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "own"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(64, config.hidden_size)
        self.intermediate = nn.Linear(config.hidden_size, 64)
        self.classifier = nn.Linear(64, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.intermediate(self.embeddings(input_ids)).relu().mean(dim=1)
        return SequenceClassifierOutput(logits=self.classifier(hidden))
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
}
CODE_FILES = ("configuration_own.py", "modeling_own.py")


def write_own_model(folder: Path, mark: Path):
    """Write a dense model with its code into a folder; running the code writes ``mark``."""
    source = folder.with_name(folder.name + "-source")
    source.mkdir(parents=True)
    for name, text in zip(CODE_FILES, (CONFIGURATION, MODELING), strict=True):
        (source / name).write_text(text.format(mark=str(mark)))
    config = {"model_type": "own", "auto_map": AUTO_MAP}
    (source / "config.json").write_text(json.dumps(config))
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification
    model = auto.from_config(config, trust_remote_code=True).eval()
    model.save_pretrained(folder)
    return model
