"""Layers whose weights a model reads without calling them get no noise, and a warning."""

import pytest
import torch
from support.tiny import make_model
from support.trainers import training_arguments
from torch import nn
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_quantnoise import QuantNoiseCallback, QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.noise import find_state


class Reader(nn.Module):
    """Calls one layer and reads the weight of another, as Mamba reads that of its ``dt_proj``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.read = nn.Linear(16, 16), nn.Linear(16, 16)
        self.calls_both = False

    def forward(self, x):
        x = self.called(x)
        return self.read(x) if self.calls_both else x @ self.read.weight


@pytest.fixture
def model():
    return apply_quant_noise(Reader().train(), QuantNoiseConfig(p=0.5, block_size=4))


def test_note_unreached_finds_a_layer_that_is_not_called(model, caplog):
    state = find_state(model)
    assert state.note_unreached() == []  # nothing has run yet
    model.eval()(torch.ones(2, 16))
    assert state.note_unreached() == []
    model.train()(torch.ones(2, 16)).sum().backward()
    assert state.note_unreached() == ["read"] == state.note_unreached()
    assert "never called" in state.left_clean["read"]
    assert "called" not in state.left_clean
    assert caplog.text.count("no quantization noise on read") == 1  # logged once
    model.calls_both = True
    model(torch.ones(2, 16))
    assert state.note_unreached() == [] and "read" not in state.left_clean


def test_note_unreached_finds_nothing_at_p_0(model):
    find_state(model).p = 0.0
    model(torch.ones(2, 16))
    assert find_state(model).note_unreached() == []


def test_callback_warns_after_a_few_steps(model, caplog, tmp_path):
    callback = QuantNoiseCallback(find_state(model).config)
    model(torch.ones(2, 16))
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    callback.on_step_end(args, TrainerState(global_step=1), control, model=model)
    assert "no quantization noise" not in caplog.text
    callback.on_step_end(args, TrainerState(global_step=8), control, model=model)
    assert "no quantization noise" in caplog.text
    callback.on_train_end(args, TrainerState(global_step=9), control, model=model)
    assert caplog.text.count("no quantization noise on read") == 1


def test_no_warning_for_layers_that_layerdrop_skips_at_first(tmp_path):
    config = QuantNoiseConfig(p=0.5, layerdrop=0.5)
    model = apply_quant_noise(make_model("bert").train(), config)
    ids = torch.full((1, 4), 7)
    args, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerControl()
    callback, state = QuantNoiseCallback(config), find_state(model)
    torch.manual_seed(0)
    for step in range(1, 12):
        model(input_ids=ids)
        callback.on_step_end(args, TrainerState(global_step=step), control, model=model)
    callback.on_train_end(args, TrainerState(global_step=12), control, model=model)
    assert not any("never called" in reason for reason in state.left_clean.values())


class ReadsTheHead(BertForSequenceClassification):
    """Multiplies by the classifier's weight without calling it, as TRL's SFTTrainer does."""

    head = "classifier"

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        pooled = self.bert(input_ids, attention_mask).pooler_output
        logits = pooled @ self.classifier.weight.T + self.classifier.bias
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class ReadsTheTiedHead(GPT2LMHeadModel):
    """The same with a head tied to the embeddings, which are called."""

    head = "lm_head"

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = hidden @ self.lm_head.weight.T
        loss = torch.nn.functional.cross_entropy(logits[:, -1], labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("kind", [ReadsTheHead, ReadsTheTiedHead])
@pytest.mark.parametrize("steps", [2, 10])
def test_a_layer_that_never_receives_noise_is_reported_once(
    kind, steps, tmp_path, parity_data, caplog
):
    model = kind(make_model("bert" if kind is ReadsTheHead else "gpt2").config)
    args = training_arguments(tmp_path, max_steps=steps)
    callbacks = [QuantNoiseCallback(QuantNoiseConfig(noise="proxy", p=0.2))]
    Trainer(model, args, train_dataset=parity_data, callbacks=callbacks).train()
    warnings = [text for text in caplog.messages if "no quantization noise on" in text]
    assert len(warnings) == 1
    assert f"no quantization noise on {kind.head}:" in warnings[0]
