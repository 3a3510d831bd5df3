"""Warnings of a run are issued once, although several of its steps find the same."""

import logging
from collections import Counter

import pytest
import torch
from support.tiny import make_model
from support.trainers import make_trainer
from torch import nn

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig
from hf_quantnoise.compression import check_plan

LARGE = "bert.encoder.layer.0.intermediate.dense"  # its values exceed float16
NOISE = QuantNoiseConfig(noise="pq", p=0.1, block_size=8, n_centroids=32)
BLOCKS = IPQConfig(block_size=4, n_centroids=16)
TARGET = IPQConfig(target_size_mb=0.1)
ONE_STEP = CompressionArguments(stage_steps=1, keep_noise=True)


def model_with_problems():
    model = make_model("bert")
    model.prompts = nn.Parameter(torch.zeros(64, 64))
    with torch.no_grad():
        model.get_submodule(LARGE).weight.mul_(1e8)
    return model


@pytest.mark.parametrize("config", [BLOCKS, TARGET], ids=["blocks", "target"])
def test_warnings_of_a_run_are_issued_once(config, tmp_path, parity_data, caplog):
    model = model_with_problems()
    with caplog.at_level(logging.WARNING, logger="hf_quantnoise"):
        check_plan(model, config)
        trainer = make_trainer(tmp_path, model, parity_data, NOISE, max_steps=1)
        trainer.compress(config, ONE_STEP)
    messages = Counter(caplog.messages)
    expected = ["skipped prompts", "noise skips 2 layers"]
    expected += ["stored in 32 bits"] if config is BLOCKS else []
    for start in expected:
        assert [count for text, count in messages.items() if start in text] == [1], start


def test_noise_on_new_models_of_a_run_warns_once(tmp_path, parity_data, caplog):
    parts = {"model_init": model_with_problems}
    trainer = make_trainer(tmp_path, None, parity_data, NOISE, parts=parts, max_steps=1)
    trainer.train()
    for start in ("skipped prompts", "noise skips 2 layers"):
        assert sum(start in text for text in caplog.messages) == 1
