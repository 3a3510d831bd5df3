"""Warnings of a run are issued once, although several of its steps find the same."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.tiny import make_model, make_vision_model
from support.trainers import make_trainer
from torch import nn

from hf_quantnoise import CompressionArguments, IPQConfig, QuantNoiseConfig, quantize_model
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


def row_group_messages(caplog):
    return [text for text in caplog.messages if "frequent_rows has no effect" in text]


IMAGES = [{"pixel_values": torch.zeros(2, 3, 32, 32)}]
TOKENS = [{"input_ids": torch.arange(8)[None]}]
# Config, model, batches, reason.
WITHOUT_TABLE = {
    "images": ({"stages": ["conv"]}, lambda: make_vision_model("convnext"), IMAGES,
               "ConvNextForImageClassification has no table of token ids; set frequent_rows=None"),
    "excluded": ({"exclude_modules": ["word_embeddings"]}, lambda: make_model("bert"), TOKENS,
                 "the table of token ids (bert.embeddings.word_embeddings) is not packed; select "
                 "it with target_modules, exclude_modules and stages, or set frequent_rows=None"),
    "in no stage": ({"stages": ["ffn"]}, lambda: make_model("bert"), TOKENS, "is not packed"),
}  # fmt: skip


@pytest.mark.parametrize("rows", [16, 0.9])
@pytest.mark.parametrize("case", WITHOUT_TABLE)
def test_frequent_rows_without_a_table_are_warned_of_once(case, rows, caplog):
    fields, make, batches, reason = WITHOUT_TABLE[case]
    config = IPQConfig(block_size=4, n_centroids=8, frequent_rows=rows, **fields)
    model = make()
    check_plan(model, config)  # before anything is trained or packed
    (message,) = row_group_messages(caplog)
    assert reason in message
    quantize_model(model, config, progress=False, calibration_data=batches)
    assert len(row_group_messages(caplog)) == 1


def test_frequent_rows_without_a_table_need_no_data(caplog):
    config = IPQConfig(block_size=4, n_centroids=8, stages=["conv"], frequent_rows=0.9)
    quantize_model(make_vision_model("convnext"), config, progress=False)
    assert len(row_group_messages(caplog)) == 1
    quantize_model(make_vision_model("convnext"), config, False, calibration_data=IMAGES)
    assert "is not used: ConvNextForImageClassification has no table of token ids" in caplog.text


def test_frequent_rows_of_a_table_are_not_warned_of(caplog):
    config = IPQConfig(block_size=4, n_centroids=8, frequent_rows=16)
    for fields in ({}, {"target_size_mb": 0.06}, {"exclude_modules": ["classifier"]}):
        check_plan(make_model("bert"), replace(config, **fields))
    assert row_group_messages(caplog) == []
