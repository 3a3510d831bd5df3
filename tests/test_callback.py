"""The noise of a training follows the weights: best models, other checkpoints, several runs."""

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import make_model, with_dropout
from support.trainers import assert_same, make_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_quantnoise import QuantNoiseCallback, QuantNoiseConfig, QuantNoiseTrainer
from hf_quantnoise.callback import STATE_NAME
from hf_quantnoise.noise import find_state

FITTED = QuantNoiseConfig(["pq", "int8"], p=0.2, n_centroids=16)
TRAINED = QuantNoiseConfig("pq", p=1.0, n_centroids=16, learn_codebooks=True)


class Watch(TrainerCallback):
    """Keeps the fitted tensors at the beginning of each step."""

    def __init__(self):
        self.tensors = []

    def on_step_begin(self, args, state, control, **kwargs):
        tensors = find_state(kwargs["model"]).state_dict()
        self.tensors.append({name: tensor.clone() for name, tensor in tensors.items()})


class CentroidGradients(TrainerCallback):
    """Keeps the gradients of the centroids of each step; can interrupt the first step."""

    def __init__(self, interrupt):
        self.interrupt, self.steps = interrupt, []

    def on_substep_end(self, args, state, control, **kwargs):
        if self.interrupt:
            self.interrupt = False
            raise KeyboardInterrupt

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([each.grad.clone() for each in find_state(model).parameters()])


def make_bert_trainer(folder, data, noise, watch=None, model=None, parts=None, **arguments):
    parts = {"callbacks": [watch] if watch else [], **(parts or {})}
    model = model or make_model("bert")
    return make_trainer(folder, model, data, noise, parts=parts, **arguments)


@pytest.mark.parametrize("noise", [FITTED, TRAINED], ids=["fitted", "trained"])
def test_load_best_model_at_end_loads_the_noise_of_the_best_model(noise, tmp_path, parity_data):
    trainer = make_bert_trainer(
        tmp_path, parity_data, noise, parts={"eval_dataset": parity_data}, learning_rate=1e-2,
        num_train_epochs=2, save_strategy="epoch", eval_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    centroids = find_state(trainer.model).parameters()
    trainer.train()
    best = tmp_path / "checkpoint-6"
    assert trainer.state.best_model_checkpoint == str(best)
    state = find_state(trainer.model)
    assert_same(state.state_dict(), load_file(best / STATE_NAME))
    assert all(a is b for a, b in zip(centroids, state.parameters(), strict=True))


def test_codebooks_and_scales_follow_the_weights_in_a_second_training(tmp_path, parity_data):
    """A training of one epoch does not refresh them, so each has to begin with it."""
    watch = Watch()
    trainer = make_bert_trainer(tmp_path, parity_data, FITTED, watch, learning_rate=1e-2)
    trainer.args.max_steps = 1
    for _ in range(3):
        trainer.train()
    first, second, third = watch.tensors
    for name in ("codebook", "scale"):
        key = next(key for key in first if key.endswith(f".{name}"))
        assert not torch.equal(first[key], second[key])
        assert not torch.equal(second[key], third[key])


def test_a_training_begins_without_the_gradients_of_an_interrupted_step(tmp_path, parity_data):
    found = {}
    for interrupt in (False, True):
        watch = CentroidGradients(interrupt)
        model = with_dropout(make_model("bert"), 0)
        trainer = make_bert_trainer(
            tmp_path, parity_data.select(range(8)), TRAINED, watch, model,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1,
        )  # fmt: skip
        if interrupt:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert not watch.steps
        trainer.train()
        (found[interrupt],) = watch.steps
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-7)


def test_a_config_with_tuples_resumes(tmp_path, parity_data):
    noise = QuantNoiseConfig(
        ("pq", "int8"), p=(0.1, 0.2), n_centroids=16, target_modules=("query", "key"),
        share_layers=(("bert.encoder.layer.0", "bert.encoder.layer.1"),),
    )  # fmt: skip
    saving = {"save_strategy": "steps", "save_steps": 1}
    for n_steps in (1, 2):
        trainer = make_bert_trainer(tmp_path, parity_data, noise, max_steps=n_steps, **saving)
        trainer.train(resume_from_checkpoint=n_steps > 1)
    assert trainer.state.global_step == 2
    assert QuantNoiseConfig.from_pretrained(tmp_path / "checkpoint-2") == noise


@pytest.mark.parametrize("cls", [QuantNoiseTrainer, Trainer])
@pytest.mark.parametrize("noise", [FITTED, TRAINED], ids=["fitted", "trained"])
def test_trained_centroids_are_refused_on_several_gpus_of_one_process(
    cls, noise, tmp_path, parity_data, monkeypatch
):
    """A trainer then uses ``nn.DataParallel``, whose replicas would share the centroids."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    learns, parts = noise.learn_codebooks, None
    if cls is Trainer:
        parts, noise = {"callbacks": [QuantNoiseCallback(noise)]}, None

    def train():
        model = make_model("bert")
        make_trainer(tmp_path, model, parity_data, noise, cls, parts, max_steps=1).train()

    if learns:
        with pytest.raises(ValueError, match=r"n_gpu=2.*learn_codebooks=True.*torchrun"):
            train()
    else:
        train()
