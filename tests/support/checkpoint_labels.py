"""Configs of checkpoints with and without a head for some labels."""

from transformers import BertConfig

NO_HEAD = BertConfig()


def checkpoint_for(*names: str) -> BertConfig:
    """Return the config of a checkpoint with a head for these labels."""
    config = BertConfig(id2label=dict(enumerate(names)))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.architectures = ["BertForSequenceClassification"]
    return config
