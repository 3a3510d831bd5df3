"""Attention maps in distillation: the student computes them without dropout, and only then."""

import pytest
import torch
from support.tasks import TASKS
from support.tiny import make_model
from support.trainers import ONE_STAGE, make_task_trainer
from transformers import TrainerCallback

from hf_quantnoise import CompressionArguments, QuantNoiseConfig, apply_quant_noise
from hf_quantnoise.compression.distillation import features
from hf_quantnoise.compression.distillation.teacher import Teacher
from hf_quantnoise.compression.training.stage_trainer import StageTrainer
from hf_quantnoise.noise import find_state


def test_attention_is_eager_during_finetuning_only(tmp_path, monkeypatch):
    teacher, trainer = make_model("bert", seed=5), make_task_trainer(tmp_path)
    warnings, seen = [], []
    monkeypatch.setattr(features.logger, "warning_once", warnings.append)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append((model.config._attn_implementation, teacher.config._attn_implementation))

    original = StageTrainer.train
    monkeypatch.setattr(
        StageTrainer, "train", lambda t, *a, **k: (t.add_callback(Look()), original(t, *a, **k))[1]
    )
    trainer.compress(ONE_STAGE, CompressionArguments(distill_attention=1.0), teacher)
    assert seen == [("eager", "eager")] * 2
    assert trainer.model.config._attn_implementation == "sdpa"
    assert trainer.model.bert.config._attn_implementation == "sdpa"
    assert teacher.config._attn_implementation == "sdpa"
    assert "'eager' instead of 'sdpa'" in warnings[0]


def test_eager_attention_is_reset_after_an_error():
    model = make_model("bert")
    with pytest.raises(RuntimeError), features.eager_attention(model):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


def test_attention_maps_have_no_dropout():
    """Maps after dropout contain zeros, so the divergence of a model from itself would be large."""
    model = make_model("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if type(module).__name__ == "BertSelfAttention":
            module.dropout.p = 0.5
    args = CompressionArguments(distill_attention=1.0)
    teacher, inputs = Teacher(model, None, args), TASKS["classification"][1]()
    model.train()
    with teacher.attention_maps(model):
        teacher.prepare(model)
        outputs = model(**teacher.model_inputs(inputs, ["labels"]), **teacher.forward_kwargs)
        terms = teacher.loss_terms(model, outputs, inputs, ["labels"])
    assert terms["attention"][1].item() == pytest.approx(0, abs=1e-6)
    assert model.training and model.classifier.training


def test_layers_of_attention_keep_their_noise_while_its_maps_are_distilled():
    model = apply_quant_noise(make_model("bert"), QuantNoiseConfig("int8", p=0.5)).train()
    args = CompressionArguments(distill_attention=1.0)
    Teacher(model, make_model("bert"), args).prepare(model)
    model(**TASKS["classification"][1]())
    assert find_state(model).note_unreached() == []
