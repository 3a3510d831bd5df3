"""``model_init`` and hyperparameter search: each training starts with a new model, with noise."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from support.stacked import make_stacked
from support.trainers import assert_same, tensors, training_arguments
from transformers import hyperparameter_search
from transformers.integrations import integration_utils

from hf_quantnoise import (
    CompressionArguments,
    FixedPointConfig,
    IPQConfig,
    QuantNoiseConfig,
    QuantNoiseTrainer,
    quantize_model,
)
from hf_quantnoise.callback import STATE_NAME
from hf_quantnoise.modeling import packed_layers
from hf_quantnoise.noise import find_state

NOISES = {
    "none": None,
    "pq": QuantNoiseConfig(noise="pq", n_centroids=8),
    "shared layers": QuantNoiseConfig(p=0.5, share_layers=2),
    "layerdrop": QuantNoiseConfig(layerdrop=0.2),
}
SMALL = IPQConfig(block_size=4, n_centroids=8, stages=["ffn"])
ONE_STEP = CompressionArguments(stage_steps=1, plots=False)


def make_init_trainer(folder, data, noise=None, model_init=None, **changes):
    arguments = training_arguments(folder, **{"max_steps": 2, **changes})
    return QuantNoiseTrainer(
        None, arguments, noise, train_dataset=data, eval_dataset=data.select(range(16)),
        model_init=model_init or (lambda: make_stacked("bert", 2)),
    )  # fmt: skip


@pytest.mark.parametrize("noise", NOISES)
def test_each_training_starts_from_a_new_model(noise, tmp_path, parity_data):
    trainer = make_init_trainer(tmp_path, parity_data, NOISES[noise])
    trainer.train()
    first = tensors(trainer.model)
    trainer.train()
    assert_same(tensors(trainer.model), first)
    assert (find_state(trainer.model) is not None) == (noise != "none")
    small = trainer.compress(SMALL, ONE_STEP)
    assert any(packed_layers(small))
    trainer.train()
    assert_same(tensors(trainer.model), first)


def test_attention_maps_of_each_new_model_are_distilled(tmp_path, parity_data):
    trainer = QuantNoiseTrainer(
        None, training_arguments(tmp_path, max_steps=1, logging_steps=1), train_dataset=parity_data,
        model_init=lambda: make_stacked("bert", 2), teacher=make_stacked("bert", 4),
        compression_args=CompressionArguments(distill_attention=1.0),
    )  # fmt: skip
    for _ in range(2):
        trainer.train()
        assert trainer.state.log_history[0]["teacher_attention"] > 0
        assert trainer.model.config._attn_implementation == "sdpa"
    trainer.model = None  # as after a hyperparameter search
    trainer.train()


def test_model_init_resumes(tmp_path, parity_data):
    trainer = make_init_trainer(
        tmp_path, parity_data, NOISES["pq"], save_strategy="steps", save_steps=1, max_steps=3
    )
    trainer.train()
    expected = tensors(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(tensors(trainer.model), expected)
    trainer.model = trainer.model_wrapped = None  # as after a hyperparameter search
    trainer.train(resume_from_checkpoint=True)
    assert_same(tensors(trainer.model), expected)

    def packed():
        return quantize_model(make_stacked("bert", 2), FixedPointConfig(), progress=False)

    other = make_init_trainer(tmp_path, parity_data, model_init=packed)
    with pytest.raises(ValueError, match="0 packed layers, the model has"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


class FakeTrial:
    """A trial of optuna whose values are drawn from a fixed list."""

    def __init__(self, number):
        self.number, self.params = number, {}

    def suggest_float(self, name, low, high, **kwargs):
        self.params[name] = low if self.number == 0 else high
        return self.params[name]


class FakeStudy:
    def __init__(self):
        self.trials = []

    def optimize(self, objective, n_trials, **kwargs):
        for number in range(n_trials):
            trial = FakeTrial(number)
            trial.value = objective(trial)
            self.trials.append(trial)

    @property
    def best_trial(self):
        return min(self.trials, key=lambda trial: trial.value)

    def _is_multi_objective(self):
        return False


@pytest.fixture
def optuna(monkeypatch):
    """The package, or as much of it as transformers uses."""
    try:
        import optuna
    except ImportError:
        optuna = ModuleType("optuna")
        optuna.trial = SimpleNamespace(BaseTrial=FakeTrial)
        optuna.Trial, optuna.create_study = FakeTrial, lambda **kwargs: FakeStudy()
        monkeypatch.setitem(sys.modules, "optuna", optuna)
        for module in (hyperparameter_search, integration_utils):
            monkeypatch.setattr(module, "is_optuna_available", lambda: True)
    return optuna


@pytest.mark.parametrize("noise", NOISES)
def test_hyperparameter_search(noise, optuna, tmp_path, parity_data):
    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}

    trainer = make_init_trainer(tmp_path, parity_data, NOISES[noise])
    best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna")
    with pytest.raises(ValueError, match=r"has no model.*call train\(\)"):
        trainer.compress(SMALL, ONE_STEP)
    trainer.args.learning_rate = best.hyperparameters["learning_rate"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best.objective)
    assert any(packed_layers(trainer.compress(SMALL, ONE_STEP)))


def test_checkpoints_of_a_hyperparameter_search_have_the_noise(optuna, tmp_path, parity_data):
    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}

    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_init_trainer(tmp_path, parity_data, NOISES["pq"], **saving)
    trainer.hyperparameter_search(space, n_trials=2, backend="optuna")
    checkpoints = list(tmp_path.glob("run-*/checkpoint-*"))
    assert len(checkpoints) >= 2
    assert all((each / STATE_NAME).is_file() for each in checkpoints)
